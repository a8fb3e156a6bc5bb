import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
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


def test_the_clustered_error_is_that_of_statsmodels_formula():
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 0.5, 0.25]
    clusters = ["a", "a", "b", "c", "c", "c", "d"]
    mean = float(np.mean(values))
    sums = [1.0 - 2 * mean, 1.0 - mean, 1.5 - 3 * mean, 0.25 - mean]
    expected = math.sqrt(4 / 3 * sum(each**2 for each in sums)) / 7
    assert mean_and_error(values, clusters) == (pytest.approx(mean), pytest.approx(expected))
    assert mean_and_error(values, range(7)) == pytest.approx(mean_and_error(values))
    assert mean_and_error([0.0, 1.0], "aa") == mean_and_error([0.0, 1.0]), "a single group"


@given(st.lists(st.booleans(), min_size=2, max_size=30), st.integers(2, 5))
def test_copies_of_values_tell_no_more_than_the_values(right, copies):
    values = [float(each) for each in right]
    repeated = [value for value in values for _ in range(copies)]
    clusters = [number for number in range(len(values)) for _ in range(copies)]
    assert mean_and_error(repeated, clusters) == pytest.approx(mean_and_error(values))
    assert interval(values, range(len(values))) == pytest.approx(interval(values))
    low, high = interval(repeated, clusters)
    known_low, known_high = interval(values)
    if 0 < sum(values) < len(values):
        assert low <= known_low and known_high <= high, "the error is estimated: Student's t is wider"


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=1, max_size=60))
def test_a_clustered_interval_contains_the_share(found):
    values, clusters = [float(right) for right, _ in found], [cluster for _, cluster in found]
    low, high = interval(values, clusters)
    assert 0 <= low <= np.mean(values) + 1e-9 and np.mean(values) - 1e-9 <= high <= 1
    assert high - low >= interval(values)[1] - interval(values)[0] - 1e-9, "never narrower than without clusters"


def test_clustered_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = plain = 0
    for _ in range(400):
        shares = rng.beta(1, 1, size=60)  # of each prompt
        values = (rng.random((60, 4)) < shares[:, None]).astype(float).ravel().tolist()
        low, high = interval(values, [number for number in range(60) for _ in range(4)])
        covered += low <= 0.5 <= high
        low, high = interval(values)
        plain += low <= 0.5 <= high
    # 95 % of 400, with four standard errors of 1.1 %
    assert covered > 0.905 * 400 > plain


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
