"""The smallest models of both families, for tests of what they have in common."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TinyFamily:
    """A family's whole tiny checkpoint; tests only read it."""

    name: str
    checkpoint: Path

    make: Callable[..., Path]
    """Writes another checkpoint: ``make(folder, seed=1)``."""

    side: int = 64
    """Pixels of a side of its images."""
