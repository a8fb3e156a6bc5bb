"""Estimates of real steps are near what the steps take."""

import pytest

from vargpt_rl.bench import memory
from vargpt_rl.bench.memory import Case


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_step_takes_what_is_estimated(stage):
    case = Case("tiny", stage, 0, 64, 2)
    assert memory.estimate(case) == pytest.approx(memory.measure_torch(case), rel=memory.TOLERANCE)


def test_the_middle_model_is_of_some_340_million_parameters():
    whole = memory.estimate(Case("middle", "sft", 0, 64, 1))
    assert 4 * 335e6 < whole < 6 * 4 * 345e6
