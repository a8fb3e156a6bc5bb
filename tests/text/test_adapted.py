"""Sets of an adapter as whole layers of its base: merged, complete, and only those that change."""

import pytest
import torch
from safetensors.torch import load_file

from vargpt_rl.model.adapter import AdapterConfig, is_adapter
from vargpt_rl.storage.adapter import write_fresh_adapter
from vargpt_rl.storage.checkpoint import Policy, check_checkpoint, load_fused, save_checkpoint
from vargpt_rl.storage.sharded import stored_in_folder
from vargpt_rl.text import adapted
from vargpt_rl.text.adapted import MergedLayers
from vargpt_rl.text.layout import check_set, is_text

LORA = AdapterConfig("lora", rank=2, alpha=3.0, targets=["q_proj", "down_proj", "image_decoder"])


@pytest.fixture(scope="module")
def fresh(checkpoint, tmp_path_factory):
    weights = tmp_path_factory.mktemp("adapter") / "final"
    write_fresh_adapter(str(checkpoint), LORA, weights, 0, torch.float32)
    return weights


@pytest.fixture(scope="module")
def tuned(fresh):
    torch.manual_seed(0)
    tensors = {name: 0.1 * torch.randn_like(tensor) for name, tensor in load_file(check_checkpoint(fresh)).items()}
    return save_checkpoint(fresh.with_name("tuned"), tensors)


def text_of(weights) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(check_checkpoint(weights)).items() if is_text(name)}


def received(layers: MergedLayers, weights) -> dict[str, torch.Tensor]:
    tensors = text_of(weights)
    layers.check({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    return {name: tensor for chunk in layers.chunks(tensors) for name, tensor in chunk.items()}


def test_layers_are_whole_and_as_fused(checkpoint, fresh, tuned):
    layers = MergedLayers(str(checkpoint), LORA)
    assert received(layers, fresh) == {}, "nothing changes"
    found = received(layers, tuned)
    shapes = {name: stored.shape for name, stored in stored_in_folder(checkpoint).items() if is_text(name)}
    check_set({name: tuple(tensor.shape) for name, tensor in found.items()}, shapes)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in found} == {"q_proj", "k_proj", "v_proj", "down_proj"}
    fused = load_fused(Policy(str(checkpoint), (tuned,), LORA), torch.float32)
    assert all(torch.equal(tensor, fused.get_parameter(name)) for name, tensor in found.items())
    base = stored_in_folder(checkpoint)
    back = received(layers, fresh)
    assert back.keys() == found.keys() and all(torch.equal(own, base[name].read()) for name, own in back.items())


def test_large_sets_come_in_chunks(checkpoint, tuned, monkeypatch):
    monkeypatch.setattr(adapted, "CHUNK", 1)
    chunks = list(MergedLayers(str(checkpoint), LORA).chunks(text_of(tuned)))
    assert len(chunks) > 2 and all(len({name.partition("_proj")[0][:-1] for name in chunk}) == 1 for chunk in chunks)


def test_matrices_of_another_base_are_refused(checkpoint, tuned):
    shapes = {name: tuple(tensor.shape) for name, tensor in text_of(tuned).items()}
    name = next(name for name in shapes if is_adapter(name) and ".lora_A." in name)
    layers = MergedLayers(str(checkpoint), LORA)
    with pytest.raises(ValueError, match="matrices of a layer"):
        layers.check(shapes | {name: (2, 7)})
    with pytest.raises(ValueError, match="expected a pair of matrices of a weight"):
        layers.check({name: shapes[name]})
