import math

import numpy as np
import pytest
from scipy.stats import binomtest, t

from vargpt_rl.common.averages import interval, mean_and_error, share_with_interval, wilson, with_interval


def test_mean_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="nothing was scored"):
        mean_and_error([])


def test_mean_and_standard_error():
    mean, error = mean_and_error([0.0, 1.0, 1.0, 0.0])
    assert mean == 0.5
    assert error == pytest.approx(math.sqrt(1 / 3) / 2)


@pytest.mark.parametrize(("right", "count"), [(0, 1), (3, 3), (7, 120), (60, 120), (119, 120)])
def test_the_interval_of_a_share_is_wilsons(right, count):
    known = binomtest(right, count).proportion_ci(method="wilson")
    assert wilson(right, count) == pytest.approx((known.low, known.high))
    assert interval([1.0] * right + [0.0] * (count - right)) == pytest.approx((known.low, known.high))


def test_the_interval_of_a_mean_is_students():
    values = [0.25, 0.5, 0.125, 0.75]
    known = t.interval(0.95, 3, loc=np.mean(values), scale=np.std(values, ddof=1) / 2)
    assert interval(values) == pytest.approx(known)
    assert interval([0.25]) is None and with_interval("score", [0.25]) == {"score": 0.25}


def test_an_interval_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="0 of 0"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="3 of 2"):
        wilson(3, 2)
    with pytest.raises(ValueError, match="nothing was scored"):
        with_interval("score", [])


def test_names_of_an_interval():
    assert with_interval("a", [1.0, 0.0]) == share_with_interval("a", 1, 2)
    assert set(share_with_interval("a", 0.5, 2)) == {"a", "a_low", "a_high"}
