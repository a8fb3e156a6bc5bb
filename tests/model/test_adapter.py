"""Adapters: without effect at first, equal to merged weights afterwards, and on the layers that are asked for."""

import pytest
import torch

from vargpt_rl.model.adapter import (
    AdapterConfig,
    attach,
    fresh_tensors,
    fuse,
    is_adapter,
    merged_weight,
    target_modules,
)
from vargpt_rl.model.families import load_model
from vargpt_rl.model.scales import token_count
from vargpt_rl.model.unified import replayed

SIDE = 64
LORA = AdapterConfig("lora", rank=4, dropout=0.5)


@pytest.fixture
def base(family):
    return load_model(family.checkpoint, torch.float32).eval()


def logits(model) -> torch.Tensor:
    """The image logits of two random images after a short prompt."""
    tokenizer = model.config.image_tokenizer_config
    tokens = token_count(tokenizer.schedule_for(SIDE))
    depth, values = tokenizer.symbols
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, values, (2, tokens, depth), generator=generator)
    pads = torch.full((2, tokens), model.config.image_gen_pad_token_id)
    ids = torch.cat([torch.tensor([[20, 21, 22, model.config.image_gen_start_token_id]] * 2), pads], dim=1)
    with torch.set_grad_enabled(any(parameter.requires_grad for parameter in model.parameters() if model.training)):
        return model(ids, torch.ones_like(ids), replayed(labels, (SIDE, SIDE)), text_logits=False).image_logits


def randomise(model) -> None:
    """Give the adapter an effect."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_a_fresh_adapter_changes_no_bit_of_the_output(base):
    before = logits(base)
    random = torch.get_rng_state()
    attach(base, LORA)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(logits(base), before)
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_a_merged_adapter_is_the_applied_one_and_not_the_base(base):
    before, names = logits(base), set(base.state_dict())
    attach(base, LORA)
    randomise(base)
    applied = logits(base)
    fuse(base)
    assert set(base.state_dict()) == names
    torch.testing.assert_close(logits(base), applied, rtol=1e-4, atol=1e-3)
    assert (applied - before).abs().max() > 0.1


def test_dropout_is_in_force_only_where_it_is_asked_for(base):
    attach(base, LORA)
    randomise(base)
    exact = logits(base)
    assert torch.equal(logits(base.train()), exact)
    fuse(base)
    attach(base, LORA, dropout=True)
    randomise(base)
    assert not torch.equal(logits(base.train()), logits(base.eval()))


def test_recomputation_keeps_the_gradients_of_an_adapter_on_frozen_inputs(base):
    config = AdapterConfig("lora", rank=4, targets=["language_model"])
    attach(base.train(), config)
    randomise(base)
    trained = {name: parameter for name, parameter in base.named_parameters() if is_adapter(name)}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    found = []
    for recompute in (False, True):
        if recompute:
            base.gradient_checkpointing_enable()
        logits(base).square().mean().backward()
        found.append({name: parameter.grad.clone() for name, parameter in trained.items()})
        base.zero_grad()
    assert all(gradient.any() for gradient in found[0].values())
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_targets_are_parts_modules_or_ends_of_names(base):
    names = target_modules(base, LORA)
    assert all(name.startswith(("model.language_model.", "image_decoder.", "projector_")) for name in names)
    assert {"projector_in.fc1", "image_decoder.head", "image_decoder.blocks.1.self_attention.qkv"} <= set(names)
    assert target_modules(base, AdapterConfig(targets=["projector_in.fc1"])) == ["projector_in.fc1"]
    ends = target_modules(base, AdapterConfig(targets=["self_attention.qkv"]))
    assert ends == [f"image_decoder.blocks.{block}.self_attention.qkv" for block in range(2)]
    assert any(
        name.startswith(("model.vis", "model.multi"))
        for name in target_modules(base, AdapterConfig(targets=["vision_tower"]))
    )
    for target in ("lm_head", "image_tokenizers", "qk"):
        with pytest.raises(ValueError, match=f"{target} fits no linear layer, expected parts"):
            target_modules(base, AdapterConfig(targets=["language_model", target]))


def test_parts_that_train_in_full_get_no_matrices(base):
    config = AdapterConfig("lora", targets=["fc1"], full=["image_decoder", "vision_tower"])
    assert set(target_modules(base, config)) == {"projector_in.fc1", "projector_out.fc1"}
    assert config.trains("image_decoder.head.bias") and not config.trains("projector_in.fc1.base_layer.weight")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"targets": []}, "expected one or more"),
        ({"targets": ["image_tokenizer"]}, "the image tokenizer takes no adapter"),
        ({"targets": ["image_tokenizer.decoder.conv_in"]}, "the image tokenizer takes no adapter"),
        ({"full": ["projectors"]}, "projectors is in adapter.targets too"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        AdapterConfig("lora", **settings)


def test_fresh_tensors_follow_from_the_seed_on_any_device(base):
    attach(base, LORA)
    first, again, other = (fresh_tensors(base, seed, torch.float32) for seed in (0, 0, 1))
    assert first.keys() == {name for name, _ in base.named_parameters() if is_adapter(name)}
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert all((".lora_B." in name) == (not tensor.any()) for name, tensor in first.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())
    on_meta = fresh_tensors(base.to("meta"), 0, torch.float32)
    assert all(torch.equal(tensor, on_meta[name]) for name, tensor in first.items())


def test_merging_rounds_once_and_keeps_the_base_without_effect():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(8, 6, generator=generator).bfloat16()
    base[0, 0] = -0.0
    a, b = torch.randn(2, 6, generator=generator), torch.randn(8, 2, generator=generator)
    exact = base.double() + 0.5 * b.double() @ a.double()
    merged = merged_weight(base, a, b, 0.5)
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, exact.bfloat16())
    nothing = merged_weight(base, a, torch.zeros(8, 2), 0.5)
    assert torch.equal(nothing.view(torch.int16), base.view(torch.int16))
