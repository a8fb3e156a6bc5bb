"""Hashes of tensors: what they depend on, and that a GPU's tensors have those of their copies."""

import pytest
import torch

from vargpt_rl.storage import hashes
from vargpt_rl.storage.hashes import tensor_hash


def test_a_hash_depends_on_name_dtype_shape_and_bytes():
    tensor = torch.arange(12, dtype=torch.int32).view(3, 4)
    others = [tensor.view(4, 3), tensor.view(torch.float32), tensor + 1, tensor[:2]]
    found = [tensor_hash("a", tensor), tensor_hash("b", tensor), *(tensor_hash("a", other) for other in others)]
    assert len(set(found)) == len(found)
    assert tensor_hash("a", tensor.t().contiguous().t()) == found[0], "strides do not matter"


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (2, 5)])
def test_small_tensors_have_hashes(shape):
    tensor = torch.zeros(shape, dtype=torch.bfloat16)
    assert tensor_hash("a", tensor) == tensor_hash("a", tensor.clone())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_tensor_on_a_gpu_has_the_hash_of_its_copy(monkeypatch):
    monkeypatch.setattr(hashes, "STAGED", 1000)
    for count in (0, 1, 999, 1000, 1001, 5000):
        tensor = torch.randn(count, dtype=torch.bfloat16)
        assert tensor_hash("a", tensor.cuda()) == tensor_hash("a", tensor)
