"""Agreement of a reward with verdicts: pure functions of scores."""

import math
from collections.abc import Sequence

import numpy as np


def pairs_won(chosen: Sequence[float], rejected: Sequence[float]) -> tuple[float, int]:
    """Return how many chosen sides score higher than the rejected ones (ties count half), and the number of pairs.

    ValueError without a pair.
    """
    if not len(chosen):
        raise ValueError("no pairs: expected at least one")
    ahead = np.subtract(chosen, rejected)
    return float(((ahead > 0) + 0.5 * (ahead == 0)).sum()), len(chosen)


def area_under_curve(right: Sequence[float], wrong: Sequence[float]) -> tuple[float, float]:
    """Return the probability that a right image scores above a wrong one (ties count half), and its standard error.

    The error is that of Hanley and McNeil (Radiology 143, 1982). ValueError if one side is empty.
    """
    if not len(right) or not len(wrong):
        raise ValueError(f"{len(right)} right and {len(wrong)} wrong images: expected at least one of each")
    ahead = np.subtract.outer(np.asarray(right), np.asarray(wrong))
    area = float(((ahead > 0) + 0.5 * (ahead == 0)).mean())
    both_right = area / (2 - area)
    both_wrong = 2 * area**2 / (1 + area)
    variance = (
        area * (1 - area) + (len(right) - 1) * (both_right - area**2) + (len(wrong) - 1) * (both_wrong - area**2)
    ) / (len(right) * len(wrong))
    return area, math.sqrt(max(0.0, variance))
