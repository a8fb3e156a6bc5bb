"""Seeds depend on their purpose alone, and shares get their items."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vargpt_rl.driver.seeds import apportion, seeds_for


def test_seeds_depend_on_their_purpose():
    assert seeds_for(3, 0, 1) == seeds_for(3, 0, 1) != seeds_for(3, 0, 2)


@given(st.integers(0, 300), st.lists(st.floats(0, 1), min_size=1, max_size=5).filter(sum), st.integers(0, 99))
def test_each_share_gets_its_items(count, shares, seed):
    owner = apportion(count, shares, seed)
    counts = np.bincount(owner, minlength=len(shares))
    assert len(owner) == count and len(counts) == len(shares)
    # Rounding moves each of a share's two ends by at most a half.
    assert np.abs(counts - count * np.array(shares) / sum(shares)).max() <= 1 + 1e-6
    assert (owner == apportion(count, shares, seed)).all()


def test_items_of_a_share_are_in_random_order():
    first = apportion(100, [0.25, 0.75], 0)
    second = apportion(100, [0.25, 0.75], 1)
    assert sorted(first) == sorted(second) == [0] * 25 + [1] * 75
    assert (first != second).any() and 0 < first[:50].sum() < 50
