"""Averages with their standard error, and shares with their confidence interval."""

import math
from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
"""Confidence level of every interval."""


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error. ValueError if there are no values: a score of nothing is not zero."""
    if not values:
        raise ValueError("no values to average: nothing was scored")
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return float(np.mean(values)), spread / math.sqrt(len(values))


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of the mean; None for a single value that is neither 0 nor 1.

    Of a share (all values are 0 or 1) it is Wilson's score interval, which is honest for few values and near 0 and 1;
    else Student's t interval. ValueError if there are no values.
    """
    mean, error = mean_and_error(values)
    if set(values) <= {0.0, 1.0}:
        return wilson(sum(values), len(values))
    if len(values) == 1:
        return None
    from scipy.stats import t

    half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
    return mean - half, mean + half


def wilson(successes: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a share (Wilson, 1927).

    ``successes`` may be fractional: ties count half. ValueError unless it is from 0 to ``count``, which is at least 1.
    """
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"{successes} of {count}: expected a share of at least one")
    from scipy.stats import norm

    z = float(norm.ppf((1 + CONFIDENCE) / 2))
    share = successes / count
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def with_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the mean as ``name`` and, if there is one, its `interval` as ``name_low`` and ``name_high``."""
    bounds = interval(values)
    found = {name: float(np.mean(values))}
    return found if bounds is None else found | {f"{name}_low": bounds[0], f"{name}_high": bounds[1]}


def share_with_interval(name: str, successes: float, count: int) -> dict[str, float]:
    """Return a share as `with_interval` does; ``successes`` may be fractional."""
    low, high = wilson(successes, count)
    return {name: successes / count, f"{name}_low": low, f"{name}_high": high}
