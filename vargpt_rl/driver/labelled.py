"""Pairs that people label (builder ``rewards.preferences:human``): propose them, wait, keep those with a winner.

An iteration proposes pairs of its samples and keeps their images. The run then stops (`LabelsNeeded`) until
``vargpt-rl pairs`` has answers to enough of them. The order of the two images of a proposed pair means nothing.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from configs.schema import LoopConfig
from rewards.preferences import Built, PreferencePair, check_books
from vargpt_rl.common.usage import command_line
from vargpt_rl.data.preferences import read_table
from vargpt_rl.data.rollouts import Rollouts, read_rollouts
from vargpt_rl.driver.agreement import agreements, judge_margins
from vargpt_rl.driver.grids import show_pairs
from vargpt_rl.driver.judging import NO_REWARDS, REWARDS, Rewards, read_rewards
from vargpt_rl.driver.pairs import describe_pairs, origin_of, write_scored
from vargpt_rl.driver.run import Run
from vargpt_rl.driver.sampling import SAMPLES
from vargpt_rl.driver.session import StageContext, Step
from vargpt_rl.page.labels import all_labels, majority, preferred_margins, votes
from vargpt_rl.storage.checkpoint import Policy
from vargpt_rl.storage.images import CANDIDATES, margins_path

REASONS = {"alike": "people: alike", "bad": "people: both bad", None: "people: no label or no majority"}
"""Why a proposed pair is dropped, by the label of most raters; None is no label, or no majority."""


ROUNDING = 1e-9
"""Subtracted before a product of floats is rounded up: 0.1 x 30 is a little more than 3."""


class LabelsNeeded(Exception):
    """A run waits until people have labelled pairs. The message is one line with the commands to use."""


def propose(context: StageContext, policy: Policy) -> dict:
    """Propose pairs of the iteration's samples to people and keep their images; ``policy`` is the reference."""
    context.swap_to(policy)
    rollouts, (pairs, dropped) = _proposed(context)
    if not pairs:
        raise ValueError(f"no pair could be proposed of {len(rollouts.samples)} samples; dropped: {dict(dropped)}")
    write_scored(
        context,
        context.table(CANDIDATES),
        pairs,
        context.config.dpo.recipe.micro_batch,
        origin_of(rollouts, dropped),
        judged=judge_margins(context, pairs),
    )
    show_pairs(context, read_table(context.table(CANDIDATES)), CANDIDATES)
    return {"proposed": len(pairs)}


def pair_labelled(context: StageContext, policy: Policy, judged: dict) -> dict:
    """Write the preference table of the proposed pairs that have a winner, with ``policy`` as the reference.

    ``judged`` is the report of the rewards. How often they agree with people is part of the result. LabelsNeeded if too
    few pairs are labelled.
    """
    if told := labels_missing(context.run.directory, context.name, _share(context.config)):
        raise LabelsNeeded(told)
    context.swap_to(policy)
    rollouts, (proposed, dropped) = _proposed(context)
    raters = all_labels(context.run.directory)
    winners = majority([votes(labels) for labels in raters.values()])
    pairs = []
    for pair in proposed:
        winner = winners.get(pair.pair_id)
        if winner in ("chosen", "rejected"):
            pairs.append(pair if winner == "chosen" else turned(pair))
        else:
            dropped[REASONS[winner]] += len(pair.samples)
    check_books(rollouts.samples, pairs, dropped)
    if not pairs:
        raise ValueError(f"people prefer neither image of any of {len(proposed)} pairs: {dict(dropped)}")
    origin = origin_of(rollouts, dropped)
    write_scored(context, context.table(), pairs, context.config.dpo.recipe.micro_batch, origin, context.states)
    describe_pairs(context)
    counts = {"built": len(pairs), "dropped": sum(dropped.values()), **origin, "raters": len(raters)}
    margins = json.loads(margins_path(context.table(CANDIDATES)).read_text())
    counts["people"] = agreements({name: preferred_margins(found, winners) for name, found in margins.items()})
    return counts | ({"rewards": judged} if judged else {})


def _proposed(context: StageContext) -> tuple[Rollouts, Built]:
    """Build the proposed pairs of the iteration's samples anew; they are the same each time."""
    rollouts = read_rollouts(context.rollouts / SAMPLES)
    rewards: Rewards = read_rewards(context.rollouts / REWARDS, rollouts) if context.inputs.reward else NO_REWARDS
    built = context.inputs.builder(rollouts.samples, rollouts.winners, rewards.samples, rewards.winners)
    check_books(rollouts.samples, *built)
    return rollouts, built


def turned(pair: PreferencePair) -> PreferencePair:
    """Return a pair with its sides exchanged."""
    return replace(
        pair,
        chosen=pair.rejected,
        rejected=pair.chosen,
        chosen_reward=pair.rejected_reward,
        rejected_reward=pair.chosen_reward,
    )


# Waiting for labels


def labels_missing(run: Path, stage: str, share: float) -> str:
    """Return what to say if fewer than a ``share`` of the proposed pairs have an answer; empty if enough have one.

    A pair that a rater has skipped is answered: nobody has to decide.
    """
    table = pq.read_table(run / "preferences" / f"{stage}-{CANDIDATES}.parquet", columns=["pair_id"])
    proposed = set(table["pair_id"].to_pylist())
    answered = {label.pair_id for labels in all_labels(run).values() for label in labels} & proposed
    needed = math.ceil(share * len(proposed) - ROUNDING)
    missing = needed - len(answered)
    if missing <= 0:
        return ""
    return (
        f"{missing} of {len(proposed)} pairs of {stage} wait for labels: {command_line('pairs', run)}; "
        f"then resume: {command_line('resume', run)}"
    )


def waits_for_labels(config: LoopConfig, run: Run) -> str:
    """Return what to say if the next step of a run needs labels that are missing; empty if it does not."""
    done = run.state["steps"]
    for k in range(config.iterations):
        name = f"iter-{k:02d}"
        if f"{name}/{Step.PROPOSE}" in done and f"{name}/{Step.PAIR}" not in done:
            return labels_missing(run.directory, name, _share(config.at_resolution(config.resolution_of(k))))
    return ""


def _share(config: LoopConfig) -> float:
    """Return the share of the proposed pairs that must have an answer."""
    return float(config.preference.options.get("share", 1.0))
