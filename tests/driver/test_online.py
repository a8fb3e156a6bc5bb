"""Online RL: which images are learned from, what refills a batch, and what a batch carries."""

import json
from collections import Counter

import pytest

from learners.methods import ONLINE
from tests.helpers.driver import WorkersDouble, stage_context
from vargpt_rl.data.policy_batches import read_policy_batch, write_policy_batch
from vargpt_rl.driver import groups
from vargpt_rl.driver.groups import Judges, NothingToLearnError, draw_batch, draw_groups, needs_reference, rows_of
from vargpt_rl.driver.online import recipe_for

SETTINGS = [
    "align.methods=[grpo]",
    "reward.path=rewards.shapes:shapes_reward",
    "rl.prompts=3",
    "rl.group=4",
    "rl.recipe.batch=12",
    "rl.recipe.micro_batch=4",
    "learner.ranks=1",
]


@pytest.fixture
def context(tmp_path):
    return stage_context(tmp_path, *SETTINGS, pool=WorkersDouble())


@pytest.fixture
def rewards(monkeypatch):
    """Let groups, in the order in which they are drawn, have these rewards; the last repeats."""

    def give(*given: list[float | None]) -> None:
        drawn = iter([*given, *[given[-1]] * 99])
        monkeypatch.setattr(
            groups,
            "score",
            lambda context, items, reward: ([v for _ in range(len(items) // 4) for v in next(drawn)], {}),
        )

    return give


MIXED = [1.0, 0.0, 0.0, 1.0]
EQUAL = [1.0] * 4
GRPO = ONLINE["grpo"]
UNJUDGED = Judges(None, None)


def test_advantages_are_relative_to_the_group(context, rewards):
    rewards(MIXED)
    batch = draw_batch(context, UNJUDGED, 0, GRPO)
    assert batch.advantages == [(1.0,), (-1.0,), (-1.0,), (1.0,)] * 3 and batch.rewards == MIXED * 3
    assert batch.counts == Counter({"drawn": 3, "used": 3, "unscored images": 0})
    assert len({sample.seed for sample in batch.samples}) == 12, "a seed of its own for each image"


def test_rejection_sampling_keeps_the_better_images(context, rewards):
    rewards(MIXED)
    batch = draw_batch(context, UNJUDGED, 0, ONLINE["rft"])
    assert batch.rewards == [1.0] * 6 and batch.advantages == [(1.0,)] * 6 and batch.groups == [0, 0, 1, 1, 2, 2]


def test_groups_of_equal_reward_are_counted_and_replaced(context, rewards):
    rewards(EQUAL, MIXED, EQUAL, MIXED, EQUAL, MIXED)
    batch = draw_batch(context, UNJUDGED, 0, GRPO)
    assert (batch.counts["used"], batch.counts["equal"], batch.counts["drawn"]) == (3, 3, 6)
    prompts = [prompt.text for _, jobs in context.pool.calls for prompt, _ in jobs]
    assert len(batch.all_rewards) == 24 == len(prompts)


def test_images_without_a_reward_are_left_out(context, rewards):
    rewards([1.0, None, 0.0, None])
    batch = draw_batch(context, UNJUDGED, 0, GRPO)
    assert batch.rewards == [1.0, 0.0] * 3 and batch.counts["unscored images"] == 6


@pytest.mark.parametrize(
    ("values", "counted"),
    [
        (EQUAL, "9 have equal ones (such as [1.0]) and 0 fewer than two"),
        ([0.0] * 4, "9 have equal ones (such as [0.0]) and 0 fewer than two"),
        ([None] * 4, "0 have equal ones (such as []) and 9 fewer than two"),
        ([1.0, None, None, None], "0 have equal ones (such as [1.0]) and 9 fewer than two"),
    ],
)
def test_a_reward_that_tells_nothing_apart_is_refused(context, rewards, values, counted):
    rewards(values)
    with pytest.raises(NothingToLearnError, match="no group of 4 images has different rewards") as refused:
        draw_batch(context, UNJUDGED, 0, GRPO)
    assert counted in str(refused.value)


@pytest.mark.parametrize(("pairs", "learned"), [("best_worst", [3.0, 1.0]), ("all", [2.0, 3.0, None, 1.0])])
def test_online_dpo_compares_images_of_a_group(tmp_path, rewards, pairs, learned):
    settings = [*SETTINGS, "align.methods=[online_dpo]", f"rl.pairs={pairs}"]
    context = stage_context(tmp_path, *settings, pool=WorkersDouble())
    rewards([2.0, 3.0, None, 1.0])
    batch = draw_batch(context, UNJUDGED, 0, ONLINE["online_dpo"])
    assert batch.rewards == learned * 3
    assert batch.groups == [group for group in range(3) for _ in learned]
    assert recipe_for(context, "online_dpo").batch == {"best_worst": 8, "all": 12}[pairs], (
        "a multiple of the micro-batch"
    )


def test_completions_share_the_prefix_of_the_image_before(tmp_path):
    context = stage_context(tmp_path, *SETTINGS, "rl.completions=2", "rl.prefix_scales=1", pool=WorkersDouble())
    prompts = context.source.prompts("train", 3, 0)
    images = draw_groups(context, prompts, 4, seed=0, completions=2)
    assert [image.prompt for image in images] == [prompt for prompt in prompts for _ in range(4)]
    (first, drawn), (second, completed) = context.pool.calls
    assert (first, second) == ("generate_images", "complete_images") and len(drawn) == len(completed) == 6
    assert [image.bits for image in images[::2]] == [image.bits for image, _ in completed]
    assert len({image.seed for image in images}) == 12


def test_prefix_and_rest_have_advantages_of_their_own(tmp_path, rewards):
    context = stage_context(tmp_path, *SETTINGS, "rl.completions=2", "rl.prefix_scales=1", pool=WorkersDouble())
    rewards([1.0, 1.0, 0.0, 0.0])
    batch = draw_batch(context, UNJUDGED, 0, GRPO)
    assert batch.advantages == [(1.0, 0.0), (1.0, 0.0), (-1.0, 0.0), (-1.0, 0.0)] * 3


def test_a_second_judge_scores_the_same_images(context, rewards):
    class Check:
        def values(self, verdicts):
            return [verdict * 2.0 for verdict in verdicts]

    rewards(MIXED)
    context.pool.check = lambda items, resolution, check: [1.0] * len(items)
    batch = draw_batch(context, Judges(None, Check()), 0, GRPO)
    assert batch.judged == [2.0] * 12
    assert set(batch.seconds) == {"draw", "judge"}


@pytest.mark.parametrize(("kl", "reference"), [(0.0, None), (0.1, [-1.0])])
def test_a_batch_carries_what_the_learner_needs(tmp_path, rewards, kl, reference):
    context = stage_context(tmp_path, *SETTINGS, f"rl.kl={kl}", pool=WorkersDouble())
    rewards(MIXED)
    batch = draw_batch(context, UNJUDGED, 0, GRPO)
    references = context.pool.score(batch.samples, 32) if needs_reference(context, GRPO) else None
    rows = rows_of(context, batch, GRPO, 2, references)
    write_policy_batch(tmp_path / "batch.parquet", rows)
    rows = read_policy_batch(tmp_path / "batch.parquet")
    assert [tuple(row["advantage"]) for row in rows] == batch.advantages
    assert {row["learner_step"] for row in rows} == {2} and {row["tau"] for row in rows} == {0.5}
    assert rows[0]["sampler_by_scale"] == [-2.0] and rows[0]["reference_by_scale"] == reference
    assert json.loads(rows[0]["sampling"]) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["align.methods=[ppo]"], "align.methods=['ppo']: ppo: expected one of"),
        (["align.methods=[]"], "align.methods=[]: expected some of"),
        (["align.methods=[grpo,grpo]"], "each at most once"),
        (["align.methods=[grpo]"], "grpo needs reward.path="),
        (["align.methods=[rft,reward,grpo]"], "rft needs reward.path=... or the method reward before it"),
        ([*SETTINGS, "rl.group=1"], "rl.group=1: expected 2 or more"),
        ([*SETTINGS, "rl.credit_alpha=-1"], "rl.credit_alpha=-1: expected 0 or more"),
        ([*SETTINGS, "rl.credit_scales=9"], "rl.credit_scales=9: expected 1 to 2, the scales of an image of 32 px"),
        ([*SETTINGS, "rl.pairs=some"], "rl.pairs=some: expected one of best_worst, all"),
        ([*SETTINGS, "rl.updates=3"], "rl.recipe.steps=4: expected a multiple of rl.updates=3"),
        ([*SETTINGS, "rl.beta=0"], "rl.beta=0: expected a number above 0"),
        ([*SETTINGS, "rl.completions=3"], "rl.group=4: expected a multiple of rl.completions=3"),
        ([*SETTINGS, "rl.completions=2"], "rl.prefix_scales=3: expected fewer than the 2 trained scales"),
        ([*SETTINGS, "rl.guard.max_ratio=0.5"], "rl.guard.max_ratio=0.5: expected 1 or more"),
        (
            [*SETTINGS, "align.methods=[online_dpo]", "rl.pairs=all", "rl.recipe.micro_batch=2"],
            "rl.recipe.micro_batch=2: online_dpo compares 4 images",
        ),
        ([*SETTINGS, "rl.staleness=2"], "rl.staleness=2: expected one of 0, 1"),
        ([*SETTINGS, "rl.staleness=1", "placement=colocated"], "rl.staleness=1 is for placement=split"),
        ([*SETTINGS, "rl.recipe.batch=8"], "rl.recipe.batch=8: expected at least"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=".*") as refused:
        stage_context(tmp_path, *settings)
    assert message in str(refused.value)
