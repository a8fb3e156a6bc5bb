"""Estimates are close to the measured memory of real steps."""

import pytest

from vargpt_rl.bench import memory
from vargpt_rl.bench.memory import Case


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_step_needs_the_estimated_memory(stage):
    case = Case("tiny", stage, 0, 64, 2)
    assert memory.estimate(case) == pytest.approx(memory.measure_torch(case), rel=memory.TOLERANCE)


def test_middle_model_has_about_340_million_parameters():
    whole = memory.estimate(Case("middle", "sft", 0, 64, 1))
    assert 4 * 335e6 < whole < 6 * 4 * 345e6
