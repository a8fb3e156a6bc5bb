"""The dtype that auto chooses."""

import pytest
import torch

from vargpt_rl.common import dtypes
from vargpt_rl.common.dtypes import chosen_dtype


@pytest.mark.parametrize(
    ("name", "on_gpu", "flags", "expected"),
    [
        ("auto", True, "", torch.bfloat16),
        ("auto", False, "avx2 avx512f", torch.float32),
        ("auto", False, "avx512f avx512_bf16", torch.bfloat16),
        ("auto", False, "amx_tile amx_bf16", torch.bfloat16),
        ("fp32", True, "amx_bf16", torch.float32),
        ("bf16", False, "", torch.bfloat16),
    ],
)
def test_auto_is_bf16_where_it_is_fast(name, on_gpu, flags, expected, monkeypatch):
    monkeypatch.setattr(dtypes, "cpu_flags", lambda: frozenset(flags.split()))
    assert chosen_dtype(name, on_gpu) == expected


def test_flags_are_those_of_this_machine():
    assert all(flag.strip() == flag for flag in dtypes.cpu_flags())


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype=half: expected one of auto, fp32, bf16"):
        chosen_dtype("half", False)
