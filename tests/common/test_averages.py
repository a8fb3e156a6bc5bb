import math

import pytest

from vargpt_rl.common.averages import mean_and_error


def test_mean_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="nothing was scored"):
        mean_and_error([])


def test_mean_and_standard_error():
    mean, error = mean_and_error([0.0, 1.0, 1.0, 0.0])
    assert mean == 0.5
    assert error == pytest.approx(math.sqrt(1 / 3) / 2)
