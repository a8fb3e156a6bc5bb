"""Names of steps in words."""

import pytest

from vargpt_rl.page.step_titles import step_title


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("iter-03/after_dpo", "iteration 3: evaluate DPO"),
        ("iter-03/grpo_swap", "iteration 3: GRPO swap"),
        ("iter-03/control_swap", "iteration 3: control swap"),
        ("iter-12", "iteration 12"),
        ("grpo/rollout", "GRPO: own images"),
        ("understands/before", "questions: before"),
        ("batch_size", "batch size"),
    ],
)
def test_steps_are_named_in_words(step, words):
    assert step_title(step) == words
