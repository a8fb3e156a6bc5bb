"""A learned reward in a run: what it is trained and measured on, who maximises it, and what is refused."""

from contextlib import nullcontext

import pandas as pd
import pytest

from rewards.shapes import shapes_reward
from tests.helpers.driver import WorkersDouble, stage_context
from vargpt_rl.data.preferences import write_table
from vargpt_rl.data.reward_pairs import read_pairs_file
from vargpt_rl.data.shapes_check import ImageVerdict
from vargpt_rl.data.sources import ShapesCheck
from vargpt_rl.driver import evaluation, groups, learned
from vargpt_rl.driver.groups import Judges, judges
from vargpt_rl.driver.inputs import SHAPES_CHECK, check_learned_reward
from vargpt_rl.driver.learned import ScoredPairs, current_reward
from vargpt_rl.driver.session import Step
from vargpt_rl.storage.checkpoint import Policy


class JudgingWorkers(WorkersDouble):
    """Workers that find every second image correct, and write no image."""

    def check(self, items, resolution, check):
        return [ImageVerdict(at % 2 == 0, "", ()) for at, _ in enumerate(items)]

    def write_images(self, items, resolution, folder):
        return [name for _, name in items]


def row(number: int, chosen_version: int | None = None) -> dict:
    """A row of a preference table; the chosen image is a winner's unless it has a version."""
    return {
        "pair_id": str(number),
        "prompt_id": str(number),
        "prompt": f"a thing {number}",
        "reply": "",
        "resolution": 32,
        "sampling": "{}",
        "chosen_bits": b"c",
        "rejected_bits": b"r",
        "chosen_source": "s",
        "rejected_source": "s",
        "chosen_seed": chosen_version,
        "rejected_seed": 1,
        "chosen_version": chosen_version,
        "rejected_version": 1,
        "chosen_reward": None,
        "rejected_reward": None,
        "reference_version": 1,
        **{f"reference_{side}_logp": -1.0 for side in ("chosen", "rejected")},
        **{f"reference_{side}_by_scale": [-1.0] for side in ("chosen", "rejected")},
    }


@pytest.fixture
def context(tmp_path):
    return stage_context(tmp_path, "align.methods=[reward,grpo]", pool=JudgingWorkers(), reward=shapes_reward)


def test_accuracy_is_reported_for_each_kind_of_pair():
    rows = pd.DataFrame({"chosen_version": [None, None, 3], "rejected_version": [1, 1, 2]}, dtype=pd.Int64Dtype())
    found = learned._pair_accuracies(ScoredPairs(rows, chosen=[1.0, 1.0, 0.0], rejected=[0.0, 0.0, 1.0]))
    assert (found["accuracy_winners"], found["n_winners"]) == (1.0, 2)
    assert (found["accuracy_own"], found["n_own"]) == (0.0, 1)
    assert found["accuracy"] == pytest.approx(2 / 3) and 0 < found["accuracy_low"] < 2 / 3 < found["accuracy_high"] < 1


def test_a_kind_without_pairs_is_left_out():
    rows = pd.DataFrame({"chosen_version": [None], "rejected_version": [1]}, dtype=pd.Int64Dtype())
    found = learned._pair_accuracies(ScoredPairs(rows, [1.0], [0.0]))
    assert "accuracy_winners" in found and "accuracy_own" not in found


def test_agreement_is_of_right_and_wrong_held_out_images(context, monkeypatch):
    context.table().parent.mkdir(parents=True)
    write_table(context.table("held-out"), [row(number) for number in range(4)])
    monkeypatch.setattr(learned, "score", lambda context, items, reward: ([9.0] * 4 + [4.0, 1.0, 3.0, 2.0], {}))
    found = learned._agreement(context, shapes_reward)
    assert found["agreement"] == 1.0 and (found["right"], found["wrong"]) == (2, 2)
    assert found["real_over_own"] == 1.0 and found["held_out_reward"] == 2.5


def test_both_images_of_each_pair_are_written(context, tmp_path):
    learned._write_pairs(context, pd.DataFrame([row(0), row(1, 3)]), tmp_path / "pairs")
    pairs = read_pairs_file(tmp_path / "pairs")
    assert [pair["prompt"] for pair in pairs] == ["a thing 0", "a thing 1"]
    ((name, items),) = context.pool.calls
    assert name == "write_images" and [file for _, file in items] == [
        pair[side] for pair in pairs for side in ("chosen", "rejected")
    ]
    assert [bits for (_, bits), _ in items] == [b"c", b"r"] * 2


def test_a_learned_reward_takes_over_once_it_is_recorded(context, monkeypatch):
    monkeypatch.setattr(learned, "LearnedReward", lambda path: path)
    assert current_reward(context) is shapes_reward
    context.step(Step.REWARD, lambda context: {})
    assert current_reward(context).endswith("checkpoints/iter-00-reward/final")


def test_the_exact_check_is_the_second_judge_of_a_learned_reward(tmp_path, monkeypatch):
    monkeypatch.setattr(groups, "running", lambda context, reward: nullcontext(reward))
    monkeypatch.setattr(learned, "LearnedReward", lambda path: path)
    context = stage_context(
        tmp_path, "align.methods=[reward,grpo]", f"reward.path={SHAPES_CHECK}", reward=shapes_reward
    )
    with judges(context) as live:
        assert live == Judges(shapes_reward, None), "the check that trains is no second judge"
    context.step(Step.REWARD, lambda context: {})
    with judges(context) as live:
        assert live.reward.endswith("iter-00-reward/final") and isinstance(live.judge, ShapesCheck)


@pytest.mark.parametrize(("methods", "fixed"), [("reward,grpo", True), ("dpo", True), ("grpo", False)])
def test_held_out_pairs_are_fixed_for_methods_that_learn_pairs(methods, fixed, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "score_images", lambda context, samples, keep: ({"overall": 0.5}, []))
    monkeypatch.setattr(evaluation, "write_row", lambda *args: None)
    context = stage_context(
        tmp_path, f"align.methods=[{methods}]", f"reward.path={SHAPES_CHECK}", "evaluation.prompts=4"
    )
    evaluation.evaluate(context, Policy(""), Step.AFTER_SFT)
    assert context.table("held-out").exists() == fixed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["learned_reward.held_out=1"], "learned_reward.held_out=1: expected above 0 and less than 1"),
        (["learned_reward.trains=[head]"], "learned_reward.trains=['head']: head: expected one of language_model, "),
        (["learned_reward.center=-1"], "learned_reward.center=-1: expected 0 or more"),
        (["learned_reward.recipe.batch=3"], "learned_reward.recipe: batch=3"),
        (["preference.count=8"], "preference.count=8: at most 8 pairs"),
        (["align.methods=[reward,dpo]", "dpo.min_pairs=16"], "expected dpo before reward"),
        (["align.sft=false"], "expected learned_reward.table=... or align.sft=true"),
    ],
)
def test_impossible_settings_of_a_reward_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=".*") as refused:
        stage_context(tmp_path, "align.methods=[reward]", *settings)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("side", "count", "message"),
    [
        (32, 0, "there is no such file"),
        (32, 10, "10 pairs of 10 prompts leave"),
        (64, 10, "its images have 64 px, expected 32"),
    ],
)
def test_tables_that_do_not_serve_are_refused(tmp_path, checkpoint, side, count, message):
    table = tmp_path / "pairs.parquet"
    if count:
        write_table(table, [row(number) | {"resolution": side} for number in range(count)])
    context = stage_context(tmp_path, "align.methods=[reward]", f"learned_reward.table={table}")
    with pytest.raises(ValueError, match=rf"learned_reward\.table=.*{message}"):
        check_learned_reward(context.session.config, str(checkpoint))
