"""A learned reward: train it on preference pairs, measure it on held-out ones, and use it in the methods that follow.

Pairs are those of the iteration's own preference table, or of ``learned_reward.table``. They are split by prompt.
Held-out accuracy is reported for each kind of pair: with external winners a reward may learn to tell a renderer from a
policy instead of right from wrong, which pairs of the policy's own images show. Where the source has an exact check,
its verdict on held-out images is compared with the reward, too; training never sees those.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from actors.worker import PromptedBits, Worker
from learners.jobs import RewardJob
from rewards import Reward
from rewards.learned import LearnedReward
from vargpt_rl.common.averages import share_with_interval
from vargpt_rl.data.preferences import prompts_of, read_table
from vargpt_rl.data.reward_pairs import (
    GIVEN,
    OWN,
    WINNERS,
    RewardPair,
    check_split,
    pair_kinds,
    split_by_prompt,
    write_pairs_file,
)
from vargpt_rl.data.samples import Prompt
from vargpt_rl.driver.inputs import SHAPES_CHECK
from vargpt_rl.driver.judging import score
from vargpt_rl.driver.session import StageContext, Step
from vargpt_rl.driver.training import follow
from vargpt_rl.evaluate.agreement import area_under_curve, pairs_won
from vargpt_rl.storage.checkpoint import Policy
from vargpt_rl.storage.reward_base import describe_reward

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class ScoredPairs:
    """Held-out pairs with the rewards of both sides."""

    rows: pd.DataFrame
    chosen: list[float]
    rejected: list[float]


def current_reward(context: StageContext) -> Reward | None:
    """Return the reward that methods maximise: the one that the iteration has learned, else the run's, if any."""
    return learned_reward(context) if context.is_done(Step.REWARD) else context.inputs.reward


def trains_on_check(context: StageContext) -> bool:
    """Tell whether methods maximise the shapes world's exact check, which also measures held-out images."""
    return context.config.reward.path == SHAPES_CHECK and not context.is_done(Step.REWARD)


def learned_reward(context: StageContext) -> LearnedReward:
    """Return the reward that this iteration has learned."""
    return LearnedReward(str(context.checkpoint(Step.REWARD) / "final"))


def train_reward(context: StageContext, policy: Policy) -> dict:
    """Learn a reward on the understanding half of ``policy``, and measure it on held-out pairs and images."""
    settings = context.config.learned_reward
    table = Path(settings.table) if settings.table else context.table()
    rows = read_table(table)
    check_split(rows, settings.held_out, context.config.seed, settings.recipe.batch, table)
    train, held_out = split_by_prompt(rows, settings.held_out, context.config.seed)
    folder = context.run.directory.resolve() / "rollouts" / f"{context.name}-{Step.REWARD}"
    context.swap_to(policy)
    _write_pairs(context, train, folder)
    job = RewardJob(
        start=policy,
        pairs=folder,
        recipe=settings.recipe,
        reward=settings,
        output=context.checkpoint(Step.REWARD),
        seed=context.config.seed + context.index,
    )
    result = context.session.learners.run(
        job, follow(context, Step.REWARD, settings.recipe, context.config.learner.ranks)
    )
    shutil.rmtree(folder)
    counts = {"pairs": len(train), "prompts": int(train.prompt.nunique()), "held_out_pairs": len(held_out)}
    describe_reward(context.checkpoint(Step.REWARD) / "final", policy, {"resolution": context.resolution, **counts})
    reward = learned_reward(context)
    result |= counts | _pair_accuracies(_scored(context, held_out, reward))
    if context.inputs.pairs is None:  # else the held-out images are not the policy's
        result |= _agreement(context, reward)
    context.log(
        f"evaluate/{Step.REWARD}",
        context.index,
        {key: result[key] for key in result if key not in ("steps", "seconds")},
    )
    return result


def _write_pairs(context: StageContext, rows: pd.DataFrame, folder: Path) -> None:
    """Decode both images of each pair in the workers, as PNG files, and write the table of pairs."""
    pairs = []
    items: list[tuple[PromptedBits, str]] = []
    for number, row in enumerate(rows.to_dict("records")):
        prompt = Prompt(row["prompt_id"], row["prompt"], row["reply"])
        names = [f"{number:06d}-{side}.png" for side in SIDES]
        items += [((prompt, row[f"{side}_bits"]), name) for side, name in zip(SIDES, names, strict=True)]
        pairs.append(RewardPair(row["prompt"], *names))
    folder.mkdir(parents=True, exist_ok=True)
    context.pool.run(Worker.write_images, items, context.resolution, str(folder))
    write_pairs_file(folder, pairs)


def _scored(context: StageContext, rows: pd.DataFrame, reward: Reward) -> ScoredPairs:
    """Score both sides of each row in the reward's own process. ValueError if one is not scored."""
    prompts = prompts_of(rows)
    items = [item for side in SIDES for item in zip(prompts, rows[f"{side}_bits"], strict=True)]
    values, report = score(context, items, reward)
    found = [value for value in values if value is not None]
    if len(found) < len(values):
        raise ValueError(f"the learned reward scored {len(found)} of {len(values)} held-out images: {report}")
    return ScoredPairs(rows, found[: len(rows)], found[len(rows) :])


def _pair_accuracies(pairs: ScoredPairs) -> dict[str, float]:
    """Return the accuracy on held-out pairs with its interval: of all, and of each kind that there is."""
    kinds = pair_kinds(pairs.rows).tolist()
    result: dict[str, float] = {}
    every = (WINNERS, OWN, GIVEN)
    for name, wanted in [("", every), *((f"_{kind}", (kind,)) for kind in every)]:
        chosen = [value for value, kind in zip(pairs.chosen, kinds, strict=True) if kind in wanted]
        rejected = [value for value, kind in zip(pairs.rejected, kinds, strict=True) if kind in wanted]
        if chosen:
            result |= share_with_interval(f"accuracy{name}", *pairs_won(chosen, rejected)) | {f"n{name}": len(chosen)}
    return result


def _agreement(context: StageContext, reward: Reward) -> dict[str, float]:
    """Compare the reward with the source's exact check on the images of held-out prompts drawn after SFT.

    ``agreement``: probability that a right image has a higher reward than a wrong one. ``held_out_reward``: the mean,
    from which later methods start. ``real_over_own``: share of winners with a higher reward than the policy's image.
    """
    pairs = _scored(context, read_table(context.table("held-out")), reward)
    result: dict[str, float] = {"held_out_reward": sum(pairs.rejected) / len(pairs.rejected)}
    result |= share_with_interval("real_over_own", *pairs_won(pairs.chosen, pairs.rejected))
    if (check := context.source.image_check()) is None:
        return result
    prompts = prompts_of(pairs.rows)
    items = list(zip(prompts, pairs.rows.rejected_bits, strict=True))
    verdicts = check.values(context.pool.run(Worker.check, items, context.resolution, check))
    right = [value for value, verdict in zip(pairs.rejected, verdicts, strict=True) if verdict == 1]
    wrong = [value for value, verdict in zip(pairs.rejected, verdicts, strict=True) if verdict == 0]
    if right and wrong:
        result["agreement"], result["agreement_stderr"] = area_under_curve(right, wrong)
        result |= {"right": len(right), "wrong": len(wrong)}
    return result
