import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from actors.weights import apply, checksum, checksum_of, dtypes_of, load_weights, size_of


def model(dtype=torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(dtype)


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def weights(request, tmp_path):
    tensors = {"0.weight": torch.randn(4, 3).to(request.param), "1.bias": torch.randn(2).to(request.param)}
    save_file(tensors, tmp_path / "set.safetensors")
    return load_weights(tmp_path / "set.safetensors")


@pytest.mark.parametrize("wide", [torch.float32, None])
def test_a_model_that_took_a_set_has_its_checksum(weights, wide):
    dtypes = dtypes_of(weights)
    taker = model(wide or dtypes["1.bias"])
    assert checksum_of(taker, dtypes) != checksum(weights)
    at = taker[0].weight.data_ptr()
    for array in weights.values():
        array.flags.writeable = False  # as the object store hands them out
    apply(taker, weights)
    assert checksum_of(taker, dtypes) == checksum(weights)
    assert taker[0].weight.data_ptr() == at, "copied in place"
    assert set(dtypes) == {"0.weight", "1.bias"}
    assert size_of(weights) == 14 * dtypes["1.bias"].itemsize


def test_checksum_depends_on_names_shapes_dtypes_and_bytes_but_not_on_order():
    a, b = np.zeros((2, 3), np.float32), np.ones(2, np.float32)
    sets = [{"a": a}, {"b": a}, {"a": a.T}, {"a": a.view(np.int32)}, {"a": a + 1}, {"a": a, "b": b}]
    assert len({checksum(tensors) for tensors in sets}) == len(sets)
    assert checksum({"b": b, "a": a}) == checksum(sets[-1])
    assert checksum({"a": a.T.copy()}) == checksum({"a": a.T}), "strides are no content"
    assert checksum({"a": np.float32(1).reshape(())})


def test_a_set_that_does_not_fit_is_named_and_changes_nothing():
    taker = model()
    before = {name: tensor.clone() for name, tensor in taker.state_dict().items()}
    good = np.ones((4, 3), np.float32)
    with pytest.raises(KeyError, match="2.weight, nobody"):
        apply(taker, {"0.weight": good, "nobody": good, "2.weight": good})
    with pytest.raises(ValueError, match=r"1.bias is \(3,\)"):
        apply(taker, {"0.weight": good, "1.bias": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match=r"0.weight is .*float64"):
        apply(taker, {"0.weight": np.ones((4, 3))})
    assert all(torch.equal(before[name], tensor) for name, tensor in taker.state_dict().items())
