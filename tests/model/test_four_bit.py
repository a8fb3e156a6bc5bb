"""Frozen parts in 4 bits, on a CPU: which layers, their error, the adapter beside them, and gradients through them."""

import numpy as np
import pytest
import torch

from actors.worker import Worker
from tests.helpers.tiny import BITS, Patches
from vargpt_rl.data.samples import Prompt
from vargpt_rl.memory.plan import four_bit_bytes
from vargpt_rl.model.adapter import AdapterConfig, is_adapter
from vargpt_rl.model.bits import pack
from vargpt_rl.model.four_bit import four_bit_layers
from vargpt_rl.model.generate import SamplingConfig
from vargpt_rl.model.scales import token_count
from vargpt_rl.stages import STAGES, freeze
from vargpt_rl.storage.adapter import adapted_on_meta, write_fresh_adapter
from vargpt_rl.storage.checkpoint import Policy, load_fused, load_policy

QLORA = AdapterConfig("lora", rank=4, four_bit=["language_model"])
SIDE = 64
PROMPT = Prompt("p", "a red circle", "Here:")
HALF = torch.bfloat16

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (make test-qlora)")


@pytest.fixture(scope="module")
def policy(checkpoint, tmp_path_factory) -> Policy:
    weights = tmp_path_factory.mktemp("qlora") / "final"
    write_fresh_adapter(str(checkpoint), QLORA, weights, 0, HALF)
    return Policy(str(checkpoint), (weights,), QLORA)


@pytest.fixture(scope="module")
def quantised(policy):
    return load_policy(policy, HALF)


def test_the_language_models_layers_and_no_others_are_in_4_bits(quantised):
    names = [name for name, module in quantised.named_modules() if type(module).__name__ == "Linear4bit"]
    assert names == four_bit_layers(quantised, QLORA.four_bit) and len(names) > 5
    assert all(name.startswith("model.language_model.") and name.endswith(".base_layer") for name in names)
    assert {p.dtype for name, p in quantised.named_parameters() if is_adapter(name)} == {HALF}
    whole = load_policy(Policy(str(quantised.config.name_or_path)), HALF)
    for name in names:
        small = quantised.get_submodule(name)
        weight = whole.get_parameter(f"{name.removesuffix('.base_layer')}.weight")
        inputs = torch.eye(weight.shape[1], dtype=HALF)
        bias = 0 if small.bias is None else small.bias
        error = (small(inputs) - bias).T - weight
        assert error.norm() < 0.12 * weight.norm(), "NF4 of a normal weight"


def test_the_plan_counts_the_weights_in_4_bits(policy, quantised):
    model = adapted_on_meta(policy.model, QLORA)
    saved, largest = four_bit_bytes(model, QLORA, HALF)
    names = four_bit_layers(model, QLORA.four_bit)
    sizes = [model.get_parameter(f"{name}.weight").numel() for name in names]
    packed = sum(quantised.get_parameter(f"{name}.weight").nbytes for name in names)
    assert packed == sum(sizes) / 2 and largest == 2 * max(sizes)
    assert saved == pytest.approx(1.484 * sum(sizes), rel=1e-3)


@torch.no_grad()
def test_layers_compute_alike_in_training_and_evaluation(policy):
    model = load_policy(policy, torch.float32)
    layer = model.get_submodule(four_bit_layers(model, QLORA.four_bit)[0])
    inputs = torch.randn(5, layer.in_features)
    evaluated = layer.eval()(inputs)
    assert torch.equal(evaluated, layer.train()(inputs)) and torch.equal(evaluated, layer.eval()(inputs))
    assert not torch.equal(evaluated, evaluated.bfloat16().float()), "nothing was rounded to bf16"


def test_gradients_pass_through_4_bits_to_the_adapter(quantised):
    trained = freeze(quantised.train(), STAGES["understanding"], QLORA)
    ids = torch.arange(12)[None]
    quantised(ids, torch.ones_like(ids)).logits.float().square().mean().backward()
    gradients = {name: quantised.get_parameter(name).grad for name in trained if ".lora_B." in name}
    assert any(grad is not None and grad.abs().sum() > 0 for name, grad in gradients.items() if ".layers.0." in name)
    quantised.zero_grad()
    quantised.eval()


def test_a_worker_draws_and_scores_with_4_bits(policy):
    found = {}
    for kind in ("whole", "small"):
        adapter = QLORA if kind == "small" else AdapterConfig("lora", rank=4)
        worker = Worker(policy.model, Patches(), threads=1, bf16=True, adapter=adapter)
        tokens = token_count(worker.image_tokenizer.schedule_for(SIDE))
        bits = pack(np.random.default_rng(0).integers(0, 2, (tokens, BITS), np.uint8), 2)
        found[kind] = worker.score([(PROMPT, bits)], SIDE)[0].total
        (sample,) = worker.generate_images([(PROMPT, 0)], SIDE, SamplingConfig(cfg=1.0), "x")
        assert len(sample.bits) == len(bits)
    assert found["small"] != found["whole"] and found["small"] == pytest.approx(found["whole"], rel=0.05)


def test_exports_merge_into_the_original_weights(policy):
    fused = load_fused(policy, "auto")
    original = load_policy(Policy(policy.model), "auto")
    assert all(torch.equal(fused.get_parameter(name), own) for name, own in original.named_parameters())
