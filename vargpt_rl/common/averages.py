"""Averages with their standard error, and shares with their confidence interval."""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

CONFIDENCE = 0.95
"""Confidence level of every interval."""


def mean_and_error(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> tuple[float, float]:
    """Return the mean and its standard error. ValueError if there are no values: a score of nothing is not zero.

    ``clusters`` names the group of each value, such as the prompt of an image: values of a group need not be
    independent, and what counts for the error are the groups' sums (cluster-robust, with the factor G / (G - 1) for G
    groups; Liang and Zeger, 1986). If every value is a group of its own, that is the plain standard error, which a
    single group has too: it is then the error of that group's mean.
    """
    if not values:
        raise ValueError("no values to average: nothing was scored")
    mean = float(np.mean(values))
    sums: dict[Hashable, float] = defaultdict(float)
    for value, cluster in zip(values, _groups(values, clusters), strict=True):
        sums[cluster] += value - mean
    groups = len(sums)
    if groups == 1:
        return mean, 0.0
    return mean, math.sqrt(groups / (groups - 1) * math.fsum(each**2 for each in sums.values())) / len(values)


def interval(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of the mean; None for a single value that is neither 0 nor 1.

    Of a share (all values are 0 or 1) it is Wilson's score interval, which is honest for few values and near 0 and 1;
    else Student's t interval. With ``clusters`` (`mean_and_error`), a share counts as many independent values as would
    have its error and Student's interval (Korn and Graubard, 1998), at most all. ValueError if there are no values.
    """
    mean, error = mean_and_error(values, clusters)
    groups = len(set(_groups(values, clusters)))
    if set(values) <= {0.0, 1.0}:
        count: float = len(values)
        if groups < count:
            if 0 < mean < 1 and error > 0:
                count = min(count, mean * (1 - mean) / error**2)
            count = max(1.0, count * (_student(math.inf) / _student(groups - 1)) ** 2)
        return wilson(mean * count, count)
    if groups == 1:
        return None
    half = half_width(values, clusters)
    return mean - half, mean + half


def half_width(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> float:
    """Return half the width of the mean's 95 % interval by Student's t; 0, as its error, for a single value."""
    error = mean_and_error(values, clusters)[1]
    return _student(len(set(_groups(values, clusters))) - 1) * error if error else 0.0


def _student(degrees: float) -> float:
    """Return the quantile of Student's t that a 95 % interval takes."""
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, degrees))


def _groups(values: Sequence[float], clusters: Sequence[Hashable] | None) -> Sequence[Hashable]:
    """Return the group of each value: its own without ``clusters``, or if these are all the same."""
    return range(len(values)) if clusters is None or len(set(clusters)) == 1 else clusters


def wilson(successes: float, count: float) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a share (Wilson, 1927).

    Both may be fractional: ties count half, and dependent values less than one each. ValueError unless ``successes`` is
    from 0 to ``count``, which is at least 1.
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


def with_interval(name: str, values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> dict[str, float]:
    """Return the mean as ``name`` and, if there is one, its `interval` as ``name_low`` and ``name_high``."""
    bounds = interval(values, clusters)
    found = {name: float(np.mean(values))}
    return found if bounds is None else found | {f"{name}_low": bounds[0], f"{name}_high": bounds[1]}


def share_with_interval(name: str, successes: float, count: int) -> dict[str, float]:
    """Return a share as `with_interval` does; ``successes`` may be fractional."""
    low, high = wilson(successes, count)
    return {name: successes / count, f"{name}_low": low, f"{name}_high": high}
