"""Online RL: which images are learned from, what refills a batch, and what a batch carries."""

import json
from collections import Counter

import pytest

from learners.methods import ONLINE
from tests.helpers.driver import WorkersDouble, stage_context
from vargpt_rl.data.policy_batches import read_policy_batch, write_policy_batch
from vargpt_rl.driver import online
from vargpt_rl.driver.online import draw_batch
from vargpt_rl.storage.checkpoint import Policy

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
def it(tmp_path):
    return stage_context(tmp_path, *SETTINGS, pool=WorkersDouble())


@pytest.fixture
def rewards(monkeypatch):
    """Let groups, in the order in which they are drawn, have these rewards; the last repeats."""

    def give(*groups: list[float | None]) -> None:
        drawn = iter([*groups, *[groups[-1]] * 99])
        monkeypatch.setattr(
            online, "score", lambda it, items, reward: ([v for _ in range(len(items) // 4) for v in next(drawn)], {})
        )

    return give


MIXED = [1.0, 0.0, 0.0, 1.0]
EQUAL = [1.0] * 4
GRPO = ONLINE["grpo"]


def test_advantages_are_relative_to_the_group(it, rewards):
    rewards(MIXED)
    batch = draw_batch(it, None, 0, GRPO)
    assert batch.advantages == [1.0, -1.0, -1.0, 1.0] * 3 and batch.rewards == MIXED * 3
    assert batch.counts == Counter({"drawn": 3, "used": 3, "equal": 0, "unscored images": 0})
    assert len({sample.seed for sample in batch.samples}) == 12, "a seed of its own for each image"


def test_rejection_sampling_keeps_the_better_images(it, rewards):
    rewards(MIXED)
    batch = draw_batch(it, None, 0, ONLINE["rft"])
    assert batch.rewards == [1.0] * 6 and batch.advantages == [1.0] * 6


def test_groups_of_equal_reward_are_counted_and_replaced(it, rewards):
    rewards(EQUAL, MIXED, EQUAL, MIXED, EQUAL, MIXED)
    batch = draw_batch(it, None, 0, GRPO)
    assert (batch.counts["used"], batch.counts["equal"], batch.counts["drawn"]) == (3, 3, 6)
    prompts = [prompt.text for _, jobs in it.pool.calls for prompt, _ in jobs]
    assert len(batch.all_rewards) == 24 == len(prompts)


def test_images_without_a_reward_are_left_out(it, rewards):
    rewards([1.0, None, 0.0, None])
    batch = draw_batch(it, None, 0, GRPO)
    assert batch.rewards == [1.0, 0.0] * 3 and batch.counts["unscored images"] == 6


@pytest.mark.parametrize("values", [EQUAL, [0.0] * 4, [None] * 4, [1.0, None, None, None]])
def test_a_reward_that_tells_nothing_apart_stops_the_run(it, rewards, values):
    rewards(values)
    with pytest.raises(ValueError, match=r"reward\.path=.*: all rewards are equal in each of 9 groups"):
        draw_batch(it, None, 0, GRPO)


@pytest.mark.parametrize(("kl", "reference"), [(0.0, None), (0.1, [-1.0])])
def test_a_batch_carries_what_the_learner_needs(tmp_path, rewards, kl, reference):
    it = stage_context(tmp_path, *SETTINGS, f"rl.kl={kl}", pool=WorkersDouble())
    rewards(MIXED)
    batch = draw_batch(it, None, 0, GRPO)
    write_policy_batch(tmp_path / "batch.parquet", online._rows(it, Policy(""), batch, 2, GRPO))
    rows = read_policy_batch(tmp_path / "batch.parquet")
    assert [row["advantage"] for row in rows] == batch.advantages
    assert {row["learner_step"] for row in rows} == {2} and {row["tau"] for row in rows} == {0.5}
    assert rows[0]["sampler_by_scale"] == [-2.0] and rows[0]["reference_by_scale"] == reference
    assert json.loads(rows[0]["sampling"]) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["align.methods=[ppo]"], "align.methods=['ppo']: expected some of"),
        (["align.methods=[]"], "align.methods=[]: expected some of"),
        (["align.methods=[grpo,grpo]"], "each at most once"),
        (["align.methods=[grpo]"], "grpo needs reward.path="),
        ([*SETTINGS, "rl.group=1"], "rl.group=1: expected 2 or more"),
        ([*SETTINGS, "rl.credit_alpha=-1"], "rl.credit_alpha=-1.0: expected 0 or more"),
        ([*SETTINGS, "rl.credit_scales=9"], "rl.credit_scales=9: an image of 32 px has"),
        ([*SETTINGS, "rl.staleness=2"], "rl.staleness=2: expected 0 or 1"),
        ([*SETTINGS, "rl.staleness=1", "placement=colocated"], "rl.staleness=1 is for placement=split"),
        ([*SETTINGS, "rl.recipe.batch=8"], "rl.recipe.batch=8: expected at least"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=".*") as refused:
        stage_context(tmp_path, *settings)
    assert message in str(refused.value)
