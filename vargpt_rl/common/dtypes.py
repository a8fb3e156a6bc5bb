"""The dtype of models: one setting for workers, learners and evaluation.

In bf16, matrix products run in bfloat16 and learners keep fp32 master weights; log-probabilities are fp32 for each bit
and summed in float64 in either dtype.
"""

from functools import cache
from pathlib import Path

import torch

DTYPES = ("auto", "fp32", "bf16")
"""Values of ``dtype``. auto is bf16 on GPUs and on CPUs that multiply bf16 matrices, fp32 on other CPUs."""
CPU_FLAGS = {"amx_bf16", "avx512_bf16"}
"""Flags in /proc/cpuinfo of CPUs that multiply bf16 matrices. On others bf16 is slower than fp32."""


@cache
def cpu_flags() -> frozenset[str]:
    """Return the flags of this machine's first CPU; none where there is no /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def chosen_dtype(name: str, on_gpu: bool) -> torch.dtype:
    """Resolve a value of ``dtype`` for a GPU or for this machine's CPU. Raises ValueError for an unknown one."""
    if name not in DTYPES:
        raise ValueError(f"dtype={name}: expected one of {', '.join(DTYPES)}")
    if name == "auto":
        name = "bf16" if on_gpu or CPU_FLAGS & cpu_flags() else "fp32"
    return torch.bfloat16 if name == "bf16" else torch.float32
