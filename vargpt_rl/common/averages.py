"""Averages with their standard error."""

import math
from collections.abc import Sequence

import numpy as np


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error. ValueError if there are no values: a score of nothing is not zero."""
    if not values:
        raise ValueError("no values to average: nothing was scored")
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return float(np.mean(values)), spread / math.sqrt(len(values))
