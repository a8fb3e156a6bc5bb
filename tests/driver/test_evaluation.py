"""Held-out measures: who judges, and what is counted."""

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from tests.helpers.driver import stage_context
from vargpt_rl.common.averages import wilson
from vargpt_rl.data.samples import Prompt, Sample
from vargpt_rl.driver import evaluation
from vargpt_rl.driver.evaluation import bit_nll, score_images
from vargpt_rl.driver.inputs import SHAPES_CHECK
from vargpt_rl.storage.checkpoint import Policy

SAMPLES = [Sample(Prompt(t, t), b"", 64, 0, {}, 0, "") for t in ("a red circle", "a blue square", "a small circle")]
WHITE = Image.new("RGB", (64, 64), "white")


@contextmanager
def in_this_process(reward):
    """Stand in for the processes of rewards."""
    values = []

    def live(images, prompts):
        values[:] = reward(images, prompts)
        return values

    live.renewed = lambda: live
    live.report = lambda: {
        "reward": {"scored": len(values), "mean": 0.5, "seconds": 0.1, "restarts": 0, "unscored": {}, "errors": {}}
    }
    yield live


def training_reward(images, prompts):
    return [1.0] * len(images)


def judge(images, prompts):
    return [None if "small" in prompt else float("red" in prompt) for prompt in prompts]


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """Score images with a reward and a judge, with or without the source's exact check."""
    monkeypatch.setattr("vargpt_rl.driver.judging.running", lambda context, reward: in_this_process(reward))

    def score(samples, reward=None, judge=None, exact=True, settings=()):
        context = stage_context(tmp_path, *settings, reward=reward, judge=judge)
        context.pool.reward = lambda items, side, call: call([WHITE] * len(items), [p.text for p, _ in items])
        context.pool.check = lambda items, side, check: check([WHITE] * len(items), [prompt for prompt, _ in items])
        if not exact:
            context.inputs.source.image_check = lambda: None
        return score_images(context, samples)[0]

    return score


def test_the_exact_check_scores_with_the_judge_beside_it(scored):
    assert scored(SAMPLES, training_reward)["overall"] == 0.0, "nothing is on a white image"
    assert "judge" not in scored(SAMPLES, training_reward)
    scores = scored(SAMPLES, training_reward, judge)
    assert (scores["overall"], scores["judge"], scores["judge_n"]) == (0.0, 0.5, 2)
    assert (scores["judge_low"], scores["judge_high"]) == pytest.approx(wilson(1, 2))


def test_a_reward_that_is_the_exact_check_does_not_score_again(scored):
    scores = scored(SAMPLES, training_reward, settings=[f"reward.path={SHAPES_CHECK}"])
    assert (scores["reward"], scores["reward_n"], scores["overall"]) == (0.0, 3, 0.0)
    assert scored(SAMPLES, training_reward)["reward"] == 1.0


def test_without_an_exact_check_the_judge_scores_else_the_reward(scored):
    judged = scored(SAMPLES, training_reward, judge, exact=False)
    assert (judged["overall"], judged["n"], judged["unscored"]) == (0.5, 2, 1)
    assert (judged["judge"], judged["reward"], judged["reward_n"]) == (0.5, 1.0, 3), "the training reward is beside it"
    assert scored(SAMPLES, None, judge, exact=False)["overall"] == 0.5
    alone = scored(SAMPLES, training_reward, exact=False)
    assert (alone["overall"], alone["overall_high"], alone["n"], alone["unscored"]) == (1.0, 1.0, 3, 0)
    assert alone["overall_low"] == pytest.approx(wilson(3, 3)[0])
    assert scored(SAMPLES, exact=False) == {"n": 3}


def test_images_of_one_prompt_are_not_independent_of_one_another(scored):
    once = scored(SAMPLES, None, judge, exact=False)
    repeated = scored(SAMPLES * 6, None, judge, exact=False)
    assert (repeated["judge"], repeated["judge_n"]) == (once["judge"], 6 * once["judge_n"])
    assert repeated["judge_low"] <= once["judge_low"] and once["judge_high"] <= repeated["judge_high"]


def test_images_are_kept_with_their_verdicts(tmp_path):
    context = stage_context(tmp_path, "tracking.images=2")
    context.pool.check = lambda items, side, check: check([WHITE] * len(items), [prompt for prompt, _ in items])
    images = score_images(context, SAMPLES, keep="after_sft")[1]
    assert [image.image for image in images[:2]] == [f"images/iter-00-after_sft/000{i}.webp" for i in range(2)]
    assert images[2].image is None and not list(context.run.directory.glob("images/*/0002.webp"))
    assert [image.skill for image in images] == ["colours", "colours", "single_object"]
    assert images[0].reason == "expected 1 things, found 0"
    with Image.open(context.run.directory / images[0].image) as kept:
        assert (kept.format, kept.size) == ("WEBP", (64, 64))
    assert score_images(context, SAMPLES)[1][0].image is None, "validation keeps none"


def test_images_are_kept_without_an_exact_check(tmp_path):
    context = stage_context(tmp_path, "tracking.images=1")
    context.inputs.source.image_check = lambda: None
    context.pool.check = lambda items, side, check: check([WHITE] * len(items), [prompt for prompt, _ in items])
    means, images = score_images(context, SAMPLES, keep="after_sft")
    assert means == {"n": 3} and [bool(image.image) for image in images] == [True, False, False]
    assert images[0].skill is None and images[0].score is None


def test_the_best_is_kept_by_resolution_and_the_last_method(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(evaluation, "keep_best", lambda policy, folder, note, files: kept.append((folder, note)))
    methods = "align.methods=[dpo,reward,grpo]"
    context = stage_context(tmp_path, methods, "reward.path=rewards.shapes:shapes_reward")
    for moment in ("after_sft", "after_dpo", "after_grpo"):
        evaluation._keep_best(context, Policy(""), moment, {"overall": 0.5})
    [(folder, note)] = kept
    assert folder == context.run.directory / "best/32" and note["metric"] == "after_grpo.overall"


def test_the_best_has_a_model_card(tmp_path, monkeypatch):
    context = stage_context(tmp_path, "align.methods=[grpo]", "reward.path=rewards.shapes:shapes_reward")
    folder = context.run.directory / "best/32"

    def export(policy: Policy, folder: Path, note: dict, files: dict) -> None:
        if note["value"] > 0.4:
            folder.mkdir(parents=True)
            (folder / "best.json").write_text(json.dumps(note))

    monkeypatch.setattr(evaluation, "keep_best", export)
    evaluation._keep_best(context, Policy(""), "after_grpo", {"overall": 0.3, "n": 8})
    assert not folder.exists()
    evaluation._keep_best(context, Policy(""), "after_grpo", {"overall": 0.5, "n": 8})
    assert "| 0 | 32 | after GRPO | 8 | 0.500 |" in ModelCard.load(folder / "README.md").text


def test_nothing_scored_is_an_error_and_not_zero(scored):
    with pytest.raises(ValueError, match="none of 1 images was scored"):
        scored(SAMPLES[2:], None, judge, exact=False)


def test_bits_of_true_images_are_predicted_and_unreadable_ones_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "held_out_prompts", lambda context, count: prompts)
    prompts = [Prompt("red", "a red circle"), Prompt("bad", "a blue one"), Prompt("none", "nothing"), Prompt("x", "x")]
    context = stage_context(tmp_path)
    context.inputs.source.winner_key = lambda prompt: None if prompt.id == "none" else prompt.id
    totals = {"red": -4.0, "x": -8.0}
    context.pool.score = lambda items, side: [SimpleNamespace(total=totals[prompt.id]) for prompt, _ in items]
    # Eight bits each.
    assert bit_nll(context, Policy("")) == {"nats": 0.75, "nats_stderr": pytest.approx(0.25), "n": 2}
    assert context.inputs.quarantine.counts.total() == 1
