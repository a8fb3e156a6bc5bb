"""Agreement of a reward with verdicts."""

import pytest

from vargpt_rl.evaluate.agreement import area_under_curve, pairs_won


def test_pairs_in_order_count_and_ties_count_half():
    assert pairs_won([1.0, 2.0, 0.0, 5.0], [0.0, 2.0, 1.0, 4.0]) == (2.5, 4)


def test_the_area_is_the_share_of_right_over_wrong():
    area, error = area_under_curve([3.0, 1.0], [2.0, 0.0])
    assert area == 0.75 and 0 < error < 0.5
    assert area_under_curve([1.0, 2.0], [0.0]) == (1.0, 0.0)


def test_one_side_alone_is_refused():
    with pytest.raises(ValueError, match="0 right and 1 wrong"):
        area_under_curve([], [1.0])
    with pytest.raises(ValueError, match="no pairs"):
        pairs_won([], [])
