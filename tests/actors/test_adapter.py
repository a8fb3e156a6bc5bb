"""Workers swap an adapter alone, applied or merged: the same scores up to rounding, and the base again to the bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from actors.transport import SharedFileTransfer
from actors.weights import checksum, layout_of
from actors.worker import Worker
from tests.helpers.tiny import Patches
from vargpt_rl.data.samples import Prompt
from vargpt_rl.model.adapter import AdapterConfig, is_adapter
from vargpt_rl.model.bits import pack
from vargpt_rl.model.families import load_model
from vargpt_rl.model.generate import SamplingConfig
from vargpt_rl.model.scales import token_count
from vargpt_rl.storage.adapter import write_fresh_adapter
from vargpt_rl.storage.checkpoint import WEIGHTS, check_checkpoint, save_checkpoint

SIDE = 64
APPLIED = AdapterConfig("lora", rank=4)
MERGED = replace(APPLIED, serving="merged")
PROMPT = Prompt("p", "a red circle", "Here:")
SAMPLING = SamplingConfig(cfg=1.0, tau=0.7)


def started(family, config: AdapterConfig | None, bf16: bool = False) -> Worker:
    return Worker(str(family.checkpoint), Patches(), threads=1, bf16=bf16, adapter=config)


@pytest.fixture
def sets(family, tmp_path):
    """Weight sets of an adapter: without effect, and with one."""
    start = tmp_path / "start"
    write_fresh_adapter(str(family.checkpoint), APPLIED, start, 0, torch.float32)
    torch.manual_seed(0)
    tensors = {name: 0.05 * torch.randn_like(tensor) for name, tensor in load_file(check_checkpoint(start)).items()}
    return {"start": start, "tuned": save_checkpoint(tmp_path / "tuned", tensors)}


def swap(worker: Worker, directory, version: int) -> dict:
    path = directory / WEIGHTS
    found = worker.receive(version, checksum(path), SharedFileTransfer(layout_of(path), path))
    assert (found["version"], found["checksum"]) == (version, checksum(path))
    return found


def scores(worker: Worker) -> np.ndarray:
    """Log-probabilities by scale of two random images."""
    tokens = token_count(worker.image_tokenizer.schedule_for(SIDE))
    depth, values = worker.symbols
    rng = np.random.default_rng(0)
    dtype = np.uint8 if depth > 1 else np.int32
    images = [pack(rng.integers(0, values, (tokens, depth), dtype), values) for _ in range(2)]
    return np.array([score.by_scale for score in worker.score([(PROMPT, packed) for packed in images], SIDE)])


def base_weights(worker: Worker) -> dict[str, torch.Tensor]:
    own = worker.model.state_dict()
    return {name.replace(".base_layer", ""): tensor.clone() for name, tensor in own.items() if not is_adapter(name)}


def test_merged_scores_are_the_applied_ones_and_not_the_base(family, sets):
    base, applied, merged = (started(family, config) for config in (None, APPLIED, MERGED))
    for worker in (applied, merged):
        np.testing.assert_array_equal(scores(worker), scores(base))
        swap(worker, sets["tuned"], 1)
    np.testing.assert_allclose(scores(merged), scores(applied), rtol=1e-5, atol=1e-3)
    assert np.abs(scores(applied) - scores(base)).max() > 0.1
    jobs = [(PROMPT, 0), (PROMPT, 1)]
    drawn = [worker.generate_images(jobs, SIDE, SAMPLING, "x") for worker in (applied, merged, base)]
    bits = [[sample.bits for sample in samples] for samples in drawn]
    assert bits[0] == bits[1] != bits[2]


@pytest.mark.parametrize("bf16", [False, True])
def test_a_swap_back_restores_the_base_to_the_bit(family, sets, bf16):
    worker = started(family, MERGED, bf16)
    if bf16:
        for name, directory in list(sets.items()):
            tensors = {key: tensor.bfloat16() for key, tensor in load_file(check_checkpoint(directory)).items()}
            sets[name] = save_checkpoint(directory.with_name(f"{name}-half"), tensors)
    base = base_weights(worker)
    original = load_model(family.checkpoint, torch.bfloat16 if bf16 else torch.float32).state_dict()
    before = scores(worker)
    swap(worker, sets["tuned"], 1)
    tuned = base_weights(worker)
    assert any(not torch.equal(tuned[name], tensor) for name, tensor in base.items())
    swap(worker, sets["tuned"], 2)
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in base_weights(worker).items()), "merged once"
    swap(worker, sets["start"], 3)
    restored = base_weights(worker)
    integer = torch.int16 if bf16 else torch.int32
    for name, tensor in original.items():
        assert torch.equal(restored[name].view(integer), tensor.view(integer)), name
    np.testing.assert_array_equal(scores(worker), before)


def test_only_the_adapter_travels(family, sets):
    worker = started(family, APPLIED)
    whole = sum(tensor.nbytes for tensor in load_model(family.checkpoint, torch.float32).state_dict().values())
    found = swap(worker, sets["tuned"], 1)
    assert found["bytes"] == sum(tensor.nbytes for tensor in load_file(sets["tuned"] / WEIGHTS).values()) < whole / 2


def test_weights_of_the_base_do_not_fit_a_worker_with_an_adapter(family, sets, tmp_path):
    worker = started(family, APPLIED)
    name = "image_decoder.head.weight"
    tensor = load_model(family.checkpoint, torch.float32).get_parameter(name).detach()
    with pytest.raises(KeyError, match=name):
        swap(worker, save_checkpoint(tmp_path / "base", {name: tensor}), 1)
    swap(worker, sets["tuned"], 1)
