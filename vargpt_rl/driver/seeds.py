"""Random seeds of a run: each depends on its purpose alone, so that no step changes another's numbers."""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """Distinguishes seeds that share the run's seed and the iteration. The values are part of every number."""

    CORPUS = 0
    PROMPTS = 1
    SAMPLES = 2
    HELD_OUT = 3
    SOURCES = 4
    ONLINE = 5
    VALIDATION = 6
    DIVERSITY = 7


def seeds_for(count: int, *purpose: int) -> list[int]:
    """Return ``count`` seeds that depend on ``purpose`` and on nothing else."""
    return np.random.SeedSequence(purpose).generate_state(count).tolist()


def apportion(count: int, shares: list[float], seed: int) -> np.ndarray:
    """Assign ``count`` items to shares in random order: int64 index of each item's share.

    Each share gets its fraction of the items, rounded at its two ends.
    """
    ends = np.rint(np.cumsum(shares) / sum(shares) * count).astype(int)
    sizes = np.diff(ends, prepend=0)
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(shares)), sizes))
