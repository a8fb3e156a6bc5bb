"""Pairs: build them of samples and winners, score both sides with the reference policy, write the preference table.

Usually all samples are drawn, judged and paired before DPO starts. `sample_while_training` is the alternative for
``dpo.min_pairs``: it does so in rounds and starts DPO as soon as there are enough pairs. Each round takes the next
prompts and writes a part of the table. The earlier SFT checkpoints draw first, for all rounds, so that from the first
pairs on the workers hold the final SFT weights, which are the reference. Parts that exist after a resume are kept.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from actors.worker import ImageScore, PromptedBits, Worker
from learners.group import RunningJob
from rewards.combined import Running, merge_reports
from rewards.preferences import PreferencePair, check_books
from vargpt_rl.data.pair_statistics import statistics
from vargpt_rl.data.preferences import count_rows, join_parts, part_path, read_table, write_table
from vargpt_rl.data.rollouts import Rollouts, read_rollouts
from vargpt_rl.data.samples import Sample
from vargpt_rl.driver.agreement import Margins, join_margins, write_margins
from vargpt_rl.driver.grids import show_pairs
from vargpt_rl.driver.judging import NO_REWARDS, REWARDS, Rewards, judge_rollouts, read_rewards, running
from vargpt_rl.driver.parts import in_parts, score_fields, score_of
from vargpt_rl.driver.sampling import (
    SAMPLES,
    draw_share,
    encode_winners,
    plan_samples,
    report_speed,
)
from vargpt_rl.driver.seeds import seeds_for
from vargpt_rl.driver.session import StageContext, Step
from vargpt_rl.driver.training import finish_dpo, start_dpo
from vargpt_rl.storage.checkpoint import Policy


def pair(context: StageContext, policy: Policy, judged: dict) -> dict:
    """Build the iteration's pairs and write its preference table, with ``policy`` as the reference.

    ``judged`` is the report of the rewards, which becomes part of the result.
    """
    context.swap_to(policy)
    rollouts = read_rollouts(context.rollouts / SAMPLES)
    rewards = read_rewards(context.rollouts / REWARDS, rollouts) if context.inputs.reward else NO_REWARDS
    micro_batch = context.config.dpo.recipe.micro_batch
    counts = write_pairs(
        context, context.table(), rollouts, context.inputs.builder, rewards, micro_batch, states=context.states
    )
    describe_pairs(context)
    return counts | ({"rewards": judged} if judged else {})


def write_pairs(
    context: StageContext,
    path: Path,
    rollouts: Rollouts,
    builder: Callable,
    rewards: Rewards,
    micro_batch: int,
    part: bool = False,
    states: Path | None = None,
) -> dict:
    """Build pairs, score both sides with the weights in the workers, and write the table; return what became of all.

    Rows are in random order and scored in the micro-batches that the learner trains on first: at step 0 both run the
    same kernels on the same shapes and agree to the last bit, or nearly. The workers store the language model's states
    in ``states``, if that is given. ValueError if there is no pair, unless this is only ``part`` of a table.
    """
    samples = rollouts.samples
    pairs, dropped = builder(samples, rollouts.winners, rewards.samples, rewards.winners)
    check_books(samples, pairs, dropped)
    if not (pairs or part):
        raise ValueError(f"no pair could be built of {len(samples)} samples; dropped: {dict(dropped)}")
    origin = origin_of(rollouts, dropped)
    write_scored(context, path, pairs, micro_batch, origin, states)
    return {"built": len(pairs), "dropped": sum(dropped.values()), **origin}


def origin_of(rollouts: Rollouts, dropped: Mapping[str, int]) -> dict[str, Any]:
    """Return what a table records of the samples that its pairs were built of."""
    return {
        "samples": len(rollouts.samples),
        "prompts": len(rollouts.prompts),
        "prompts_without_winner": len(rollouts.prompts) - len(rollouts.winners),
        "dropped_by_reason": dict(dropped),
    }


def write_scored(
    context: StageContext,
    path: Path,
    pairs: list[PreferencePair],
    micro_batch: int,
    origin: dict[str, Any],
    states: Path | None = None,
    judged: Margins | None = None,
) -> None:
    """Write pairs in random order, scored with the weights in the workers, in groups of ``micro_batch`` pairs.

    The margins of their rewards are kept beside the table, with those of other rewards, ``judged``. ``states``: see
    `write_pairs`.
    """
    order = np.random.default_rng(seeds_for(1, len(pairs))[0]).permutation(len(pairs))
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = _scored_rows(context, [pairs[i] for i in order], micro_batch, path.stem, states)
    write_margins(path, pairs, judged or {})
    write_table(path, rows, origin | {"micro_batch": micro_batch})


def score_kept(
    context: StageContext,
    name: str,
    items: list[PromptedBits],
    resolution: int,
    batch_size: int,
    states: Path | None = None,
) -> list[ImageScore]:
    """Score images with the weights in the workers, in parts that are kept under ``name``.

    ``states``: see `write_pairs`.
    """

    def score(part: list[PromptedBits]) -> dict:
        found = context.pool.run(Worker.score, part, resolution, 1.0, states, batch_size=batch_size)
        return {"scores": [score_fields(each) for each in found]}

    return [
        score_of(each) for part in in_parts(context, name, items, score, unit=batch_size) for each in part["scores"]
    ]


def _scored_rows(
    context: StageContext, pairs: list[PreferencePair], micro_batch: int, name: str, states: Path | None
) -> list[dict[str, object]]:
    """Return the pairs as rows of the table, with the log-probabilities that the weights in the workers give them."""
    groups = [pairs[at : at + micro_batch] for at in range(0, len(pairs), micro_batch)]
    items: list[PromptedBits] = []
    for group in groups:  # ordered like the learner's batches: [all chosen, all rejected]
        items += [(each.prompt, each.chosen.bits) for each in group]
        items += [(each.prompt, each.rejected.bits) for each in group]
    scores = iter(score_kept(context, f"scores-{name}", items, context.resolution, 2 * micro_batch, states))
    rows = []
    for group in groups:
        chosen = [next(scores) for _ in group]
        rejected = [next(scores) for _ in group]
        rows += [p.row(c, r, context.pool.version) for p, c, r in zip(group, chosen, rejected, strict=True)]
    return rows


def describe_pairs(context: StageContext) -> None:
    """Report the iteration's table: as metrics, which the page plots, and some pairs with their images."""
    table = read_table(context.table())
    context.log("pairs", context.index, statistics(table))
    show_pairs(context, table.head(context.config.tracking.table_rows))


# Sampling and DPO at the same time


def sample_while_training(context: StageContext, policy: Policy) -> tuple[dict, dict, dict]:
    """Sample, judge and pair in rounds; return the results of sampling, of pairing and of DPO.

    DPO starts with the first ``dpo.min_pairs`` pairs and trains beside the later rounds.
    """
    rounds = PairRounds(context, policy)
    job: RunningJob | None = None

    def pair_in_rounds(context: StageContext) -> dict:
        nonlocal job
        for built in rounds.write():
            context.inputs.check_quarantine()
            if job:
                job.look()
            elif built >= rounds.min_pairs:
                job = start_dpo(context, policy, parts=len(rounds.parts))
        return rounds.join()

    result = context.step(Step.PAIR, pair_in_rounds)
    dpo = context.step(Step.DPO, finish_dpo, policy, job)
    return result["rollout"], result["pairs"], dpo


class PairRounds:
    """The rounds of an iteration: each draws the next prompts and writes a part of the preference table."""

    def __init__(self, context: StageContext, policy: Policy):
        self.context = context
        self.policy = policy
        self.plan = plan_samples(context, policy)
        self.min_pairs = context.config.dpo.min_pairs or context.config.preference.count
        size = self.min_pairs * context.config.preference.samples
        count = len(self.plan.prompts)
        self.rounds = [range(at, min(at + size, count)) for at in range(0, count, size)]
        self.parts = [part_path(context.table(), number) for number in range(len(self.rounds))]
        self.drawn = 0
        self.seconds = 0.0
        self.reports: list[dict] = []

    def write(self) -> Iterator[int]:
        """Write the parts that are missing; yield the number of pairs so far after each round."""
        done = sum(part.exists() for part in self.parts)
        begin = self.rounds[done].start if done < len(self.rounds) else len(self.plan.prompts)
        samples: dict[int, Sample] = {}
        for sampler in range(len(self.plan.samplers) - 1):
            drawn = self._draw(sampler, range(len(self.plan.prompts)), "all")  # kept until the table is written
            samples |= {i: sample for i, sample in drawn.items() if i >= begin}
        self.context.swap_to(self.policy)
        built = 0
        wanted = self.context.inputs.reward
        with running(self.context, wanted) if wanted else nullcontext() as reward:
            for number, (part, indices) in enumerate(zip(self.parts, self.rounds, strict=True)):
                if number >= done:
                    samples |= self._draw(len(self.plan.samplers) - 1, indices, f"{number:05d}")
                    self._write_part(part, [samples.pop(i) for i in self.plan.ordered(indices)], reward)
                built += count_rows(part)
                yield built

    def _draw(self, sampler: int, indices: range, keep: str) -> dict[int, Sample]:
        samples, seconds = draw_share(self.context, self.plan, sampler, indices, keep)
        self.drawn += len(samples)
        self.seconds += seconds
        return samples

    def _write_part(self, part: Path, samples: list[Sample], reward: Running | None) -> None:
        rollouts = Rollouts(samples, {})
        rollouts = Rollouts(samples, encode_winners(self.context, rollouts.prompts, part.stem))
        rewards, report = judge_rollouts(self.context, rollouts, reward, part.stem)
        self.reports.append(report)
        micro_batch = self.context.config.dpo.recipe.micro_batch
        write_pairs(
            self.context,
            part,
            rollouts,
            self.context.inputs.builder,
            rewards,
            micro_batch,
            part=True,
            states=self.context.states,
        )

    def join(self) -> dict:
        """Join the parts to the table; return what became of all samples, and the speed of drawing them."""
        origin = join_parts(self.context.table(), self.parts)
        if origin["samples"] != len(self.plan.prompts):
            raise RuntimeError(f"{len(self.plan.prompts)} samples were planned, {origin['samples']} are in the table")
        join_margins(self.context.table(), self.parts)
        describe_pairs(self.context)
        counts = {"built": sum(origin["parts"]), "dropped": sum(origin["dropped_by_reason"].values()), **origin}
        if judged := merge_reports(self.reports):
            counts["rewards"] = judged
        return {"rollout": report_speed(self.context, self.plan, self.drawn, self.seconds), "pairs": counts}
