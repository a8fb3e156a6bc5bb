"""Weight sets: their layout and checksum, and a model that takes one."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from actors.weights import DTYPES, WeightLayout, apply, check_fits, checksum, checksum_of, layout_of, stream
from vargpt_rl.storage.checkpoint import WEIGHTS, save_checkpoint


def model(dtype=torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(dtype)


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def path(request, tmp_path):
    tensors = {"0.weight": torch.randn(4, 3).to(request.param), "1.bias": torch.randn(2).to(request.param)}
    save_file(tensors, tmp_path / "set.safetensors")
    return tmp_path / "set.safetensors"


@pytest.mark.parametrize("wide", [torch.float32, None])
def test_a_loaded_set_has_its_checksum(path, wide):
    layout = layout_of(path)
    taker = model(wide or layout.dtypes["1.bias"])
    assert checksum_of(taker.state_dict(), layout.dtypes) != checksum(path)
    at = taker[0].weight.data_ptr()
    check_fits(taker, layout)
    apply(taker.state_dict(), dict(stream(path, layout.shapes)))
    assert checksum_of(taker.state_dict(), layout.dtypes) == checksum(path)
    assert taker[0].weight.data_ptr() == at, "copied in place"
    assert layout.shapes == {"0.weight": (4, 3), "1.bias": (2,)}
    assert layout.bytes == 14 * layout.dtypes["1.bias"].itemsize


def test_checksum_ignores_order_only(tmp_path):
    def of(tensors) -> str:
        save_file(tensors, tmp_path / "set.safetensors")
        return checksum(tmp_path / "set.safetensors")

    a, b = torch.zeros(2, 3), torch.ones(2)
    reshaped, retyped, changed = a.reshape(3, 2), a.view(torch.int32), a + 1
    sets = [{"a": a}, {"b": a}, {"a": reshaped}, {"a": retyped}, {"a": changed}, {"a": a, "b": b}]
    assert len({of({name: tensor.clone() for name, tensor in tensors.items()}) for tensors in sets}) == len(sets)
    assert of({"b": b, "a": a}) == of({"a": a, "b": b})
    assert of({"a": torch.tensor(1.0)}) != of({"a": torch.tensor([1.0])})
    assert layout_of(tmp_path / "set.safetensors").shapes == {"a": (1,)}


def test_check_fits_names_bad_tensors():
    taker = model()
    shapes, fp32 = {"0.weight": (4, 3)}, torch.float32
    with pytest.raises(KeyError, match="2.weight, nobody"):
        shapes_more = shapes | {"nobody": (4, 3), "2.weight": (4, 3)}
        check_fits(taker, WeightLayout(shapes_more, dict.fromkeys(shapes_more, fp32)))
    with pytest.raises(ValueError, match=r"1.bias: expected .* got \(3,\)"):
        check_fits(taker, WeightLayout(shapes | {"1.bias": (3,)}, dict.fromkeys(["0.weight", "1.bias"], fp32)))
    with pytest.raises(ValueError, match=r"0.weight: expected .* got .*float64"):
        check_fits(taker, WeightLayout(shapes, {"0.weight": torch.float64}))


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 60))
def test_chunks_keep_order_and_limit(sizes, limit):
    names = [f"t{i}" for i in range(len(sizes))]
    layout = WeightLayout(
        {name: (size,) for name, size in zip(names, sizes, strict=True)}, dict.fromkeys(names, torch.int8)
    )
    chunks = layout.chunks(limit)
    assert [name for chunk in chunks for name in chunk] == names
    for chunk in chunks:
        assert len(chunk) == 1 or sum(map(layout.size, chunk)) <= limit
    for one, following in itertools.pairwise(chunks):
        assert sum(map(layout.size, [*one, following[0]])) > limit, "no chunk is closed early"


def test_a_checkpoint_is_not_hashed_to_publish_it(tmp_path, monkeypatch):
    tensors = {"0.weight": torch.randn(4, 3), "1.bias": torch.randn(2)}
    saved = save_checkpoint(tmp_path / "final", tensors) / WEIGHTS
    save_file(tensors, tmp_path / "unmarked.safetensors")
    expected = checksum(tmp_path / "unmarked.safetensors"), checksum(tmp_path / "unmarked.safetensors", "1.bias".__eq__)
    monkeypatch.setattr("actors.weights.file_hashes", None)
    assert (checksum(saved), checksum(saved, "1.bias".__eq__)) == expected
    with pytest.raises(TypeError):
        checksum(tmp_path / "unmarked.safetensors")


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes_have_their_names_in_the_header(tmp_path, name):
    save_file({"a": torch.zeros(3, 1, dtype=DTYPES[name])}, tmp_path / "a.safetensors")
    assert layout_of(tmp_path / "a.safetensors") == WeightLayout({"a": (3, 1)}, {"a": DTYPES[name]})


def test_read_returns_requested_tensors(path):
    (bias,) = dict(stream(path, ["1.bias"])).values()
    assert torch.equal(bias, load_file(path)["1.bias"])
    assert np.prod(layout_of(path).shapes["0.weight"]) == 12
