"""Guards of online training: what stops it, which weights are kept, and that a resumed run remembers."""

import math

import pytest

from configs.stages import GuardConfig
from vargpt_rl.data.policy_batches import STOP
from vargpt_rl.driver.guard import Guard, divergence, saved_steps

GOOD = {"step": 1, "loss": 0.1, "grad_norm": 1.0, "entropy": 0.4, "ratio/max": 1.1, "kl": 0.01}


@pytest.fixture
def guard(tmp_path):
    for step in range(5):
        (tmp_path / f"grpo/step-{step:06d}").mkdir(parents=True)
        (tmp_path / f"grpo/step-{step:06d}/weights").write_text(str(step))
    (tmp_path / "batches").mkdir()
    notes: list[str] = []

    def build(**limits) -> tuple[Guard, list[str]]:
        return Guard(GuardConfig(**limits), tmp_path / "batches", tmp_path / "grpo", notes.append), notes

    return build


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"loss": math.nan}, "loss is nan, expected a finite number"),
        ({"grad_norm": math.inf}, "grad_norm is inf"),
        ({"ratio/max": 2.5}, "a ratio of policy and sampler is 2.5, expected at most rl.guard.max_ratio=2"),
        ({"kl": 0.2}, "the KL divergence is 0.2 nats a symbol"),
        ({"entropy": 0.03}, "the entropy fell from 0.4 to 0.03 nats a symbol"),
    ],
)
def test_divergence_is_told_by_its_numbers(change, reason):
    found = divergence(GOOD | change, 0.4, GuardConfig())
    assert (found is None) if reason is None else found.startswith(reason)


def test_methods_without_ratio_and_kl_are_watched_too():
    line = {name: GOOD[name] for name in ("step", "loss", "grad_norm", "entropy")}
    assert divergence(line, 0.4, GuardConfig()) is None


def test_a_divergence_stops_training_and_takes_back_the_step(guard, tmp_path):
    watching, notes = guard()
    watching.watch({"step": 0, "train_runtime": 1.0})
    watching.watch(GOOD)
    assert watching.stopped is None and not (tmp_path / "batches" / STOP).exists()
    watching.watch(GOOD | {"step": 3, "loss": math.nan})
    assert (tmp_path / "batches" / STOP).exists()
    again, _ = guard()
    assert again.stopped == watching.stopped == notes[0].removeprefix("grpo stops: ")
    assert again.keep_wanted(4) == 2 and (tmp_path / "grpo/final/weights").read_text() == "2"
    assert notes[-1] == "grpo: went back to the weights after 2 of 4 steps (the last before that)"


def test_weights_before_a_divergence_outlive_a_fast_learner(guard, tmp_path):
    """One update a batch, one batch stale: step 4 was saved before the driver looked for step 3, which diverged."""
    watching, _ = guard()
    watching.drop_weights(oldest=2)
    assert saved_steps(tmp_path / "grpo") == [2, 3, 4]
    watching.watch(GOOD | {"step": 3, "loss": math.nan})
    assert watching.keep_wanted(4) == 2


def test_the_weights_of_the_best_score_are_kept(guard, tmp_path):
    watching, notes = guard(validate_every=2)
    assert [number for number in range(5) if watching.is_due(number)] == [0, 2, 4]
    for step, score in ((0, 0.5), (2, 0.7), (4, 0.6)):
        watching.see_score(step, score)
    watching.drop_weights(oldest=3)
    assert saved_steps(tmp_path / "grpo") == [2, 3, 4]
    assert guard(validate_every=2)[0].keep_wanted(4) == 2
    assert (tmp_path / "grpo/final/weights").read_text() == "2" and "score 0.7 on held-out prompts" in notes[-1]


def test_equal_scores_keep_the_later_weights(guard, tmp_path):
    watching, notes = guard(validate_every=1)
    for step in range(5):
        watching.see_score(step, 0.5)
    assert watching.keep_wanted(4) == 4 and not notes and not (tmp_path / "grpo/final").exists()


def test_a_fall_of_diversity_is_told_once(guard):
    watching, notes = guard(min_diversity=0.5)
    for value in (0.4, 0.3, 0.1):
        watching.see_diversity(value)
    again, _ = guard(min_diversity=0.5)
    again.see_diversity(0.05)
    (note,) = notes
    assert "fell from 0.4 to 0.1, below rl.guard.min_diversity=0.5 of the first" in note
