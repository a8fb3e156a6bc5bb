"""Units, assumptions and wording that the parts of an estimate share."""

from collections.abc import Iterable
from typing import Protocol

GIB = 2**30
RUNTIME = GIB
"""Assumed per process, besides tensors: CUDA context, kernels and NCCL on a GPU, the interpreter on a CPU."""


def gib(size: int) -> str:
    """Format bytes as GiB."""
    return f"{size / GIB:.1f} GiB"


class HasTotal(Protocol):
    """An estimate in bytes."""

    @property
    def total(self) -> int: ...


def breakdown(need: HasTotal, names: Iterable[str]) -> str:
    """Format an estimate's total and the named parts of it."""
    parts = [f"{name} {getattr(need, name) / GIB:.1f}" for name in names]
    return f"{gib(need.total)} ({' + '.join([*parts, f'runtime {RUNTIME / GIB:.1f}'])})"
