"""Groups of images of one prompt, drawn and judged: what online methods learn from.

Groups whose rewards tell nothing apart are counted and replaced by other prompts' (DAPO, arXiv 2503.14476). If a second
judge is known, it scores the same images: training does not see it, and a reward that rises without it is hacked.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np

from actors.worker import ImageScore, PromptedBits, Worker
from learners.config import RlConfig
from learners.methods import OnlineMethod
from rewards.combined import Running
from vargpt_rl.data.samples import Prompt, Sample
from vargpt_rl.data.sources import ImageCheck
from vargpt_rl.driver.judging import running, score
from vargpt_rl.driver.learned import current_reward, trains_on_check
from vargpt_rl.driver.sampling import generate
from vargpt_rl.driver.seeds import Purpose, seeds_for
from vargpt_rl.driver.session import StageContext, Step
from vargpt_rl.evaluate.diversity import diversity
from vargpt_rl.model.families import load_config


class NothingToLearnError(ValueError):
    """No group has images of different reward."""


@dataclass
class DrawnBatch:
    """Images of one update that are learned from, with what became of all that were drawn."""

    samples: list[Sample] = field(default_factory=list)
    rewards: list[float | None] = field(default_factory=list)
    advantages: list[tuple[float, ...]] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    """Number of each image's group in this batch."""
    counts: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    drawn: list[list[bytes]] = field(default_factory=list)
    """Packed tokens of every group that was drawn."""
    all_rewards: list[float] = field(default_factory=list)
    """Rewards of all images, those of equal groups included."""
    judged: list[float] = field(default_factory=list)
    """The second judge's scores of all images."""


@dataclass(frozen=True)
class Judges:
    """The reward that trains, and the second judge of the same images, if there is one."""

    reward: Running
    judge: Running | ImageCheck | None


@contextmanager
def judges(context: StageContext) -> Iterator[Judges]:
    """Start the reward's processes and those of the second judge: ``evaluation.reward``, else the source's check.

    The reward is the one that the iteration has learned, else the run's.
    """
    with ExitStack() as stack:
        wanted = current_reward(context)
        assert wanted is not None, "the settings require a reward for online methods"
        reward = stack.enter_context(running(context, wanted))
        judge = stack.enter_context(running(context, context.inputs.judge)) if context.inputs.judge else None
        check = None if trains_on_check(context) else context.source.image_check()  # which would say the same
        yield Judges(reward, judge or check)


def draw_batch(context: StageContext, judges: Judges, number: int, method: OnlineMethod) -> DrawnBatch:
    """Draw groups until ``rl.prompts`` of them have different rewards, in at most ``1 + rl.refills`` rounds.

    NothingToLearnError if no group at all has: the reward says nothing about this policy's images.
    """
    settings = context.config.rl
    batch = DrawnBatch()
    for refill in range(1 + settings.refills):
        missing = settings.prompts - batch.counts["used"]
        if missing <= 0:
            break
        seed = seeds_for(1, context.config.seed, context.index, Purpose.ONLINE, number, refill)[0]
        _add_groups(context, judges, batch, _prompts(context, missing, seed), seed, method)
    if not batch.samples:
        seen = sorted(set(batch.all_rewards))[:3]
        name = "the learned reward" if context.is_done(Step.REWARD) else f"reward.path={context.config.reward.path}"
        raise NothingToLearnError(
            f"{name}: no group of {settings.group} images has different rewards: of "
            f"{batch.counts['drawn']} groups, {batch.counts['equal']} have equal ones (such as {seen}) and "
            f"{batch.counts['unscored']} fewer than two; expected rewards that tell images of a prompt apart"
        )
    return batch


def _prompts(context: StageContext, count: int, seed: int) -> list[Prompt]:
    """Return prompts of the file, or of the source, at random."""
    if context.inputs.prompts is None:
        return context.source.prompts("train", count, seed)
    order = np.random.default_rng(seed).permutation(len(context.inputs.prompts))
    return [context.inputs.prompts[i] for i in order[:count]]


def _add_groups(
    context: StageContext, judges: Judges, batch: DrawnBatch, prompts: list[Prompt], seed: int, method: OnlineMethod
) -> None:
    """Draw a group of images of each prompt and add those that ``method`` learns from to ``batch``."""
    began = time.perf_counter()
    samples = draw_groups(context, prompts, context.config.rl.group, seed, method.completions(context.config.rl))
    drew = time.perf_counter()
    items = [(sample.prompt, sample.bits) for sample in samples]
    rewards = score(context, items, judges.reward)[0]
    batch.all_rewards += [reward for reward in rewards if reward is not None]
    batch.judged += [value for value in second_opinion(context, items, judges.judge) if value is not None]
    batch.seconds["draw"] += drew - began
    batch.seconds["judge"] += time.perf_counter() - drew
    size = context.config.rl.group
    for at in range(0, len(samples), size):
        _add_group(batch, samples[at : at + size], rewards[at : at + size], method, context.config.rl)


def _add_group(
    batch: DrawnBatch,
    samples: list[Sample],
    rewards: list[float | None],
    method: OnlineMethod,
    settings: RlConfig,
) -> None:
    """Add the images of a group that ``method`` learns from, and count the group."""
    batch.drawn.append([sample.bits for sample in samples])
    number = batch.counts["drawn"]
    batch.counts["drawn"] += 1
    batch.counts["unscored images"] += rewards.count(None)
    chosen = method.choose(rewards, settings)
    if chosen is None:
        batch.counts["equal" if len(rewards) - rewards.count(None) > 1 else "unscored"] += 1
        return
    batch.counts["used"] += 1
    batch.samples += [samples[i] for i in chosen]
    batch.rewards += [rewards[i] for i in chosen]
    batch.advantages += chosen.values()
    batch.groups += [number] * len(chosen)


def draw_groups(
    context: StageContext, prompts: list[Prompt], group: int, seed: int, completions: int = 1
) -> list[Sample]:
    """Draw ``group`` images of each prompt; every ``completions`` in a row share their coarse prefix."""
    name = f"{context.name}-online"
    repeated = [prompt for prompt in prompts for _ in range(group // completions)]
    seeds = seeds_for(len(prompts) * group, seed)
    firsts = generate(context, repeated, seeds[: len(repeated)], name)
    if completions == 1:
        return firsts
    more = completions - 1
    jobs = list(zip([first for first in firsts for _ in range(more)], seeds[len(repeated) :], strict=True))
    scales = context.config.rl.prefix_scales
    others = context.pool.run(Worker.complete_images, jobs, scales, context.resolution, context.config.sampling, name)
    return [image for i, first in enumerate(firsts) for image in (first, *others[i * more : (i + 1) * more])]


def second_opinion(
    context: StageContext, items: list[PromptedBits], judge: Running | ImageCheck | None
) -> list[float] | list[float | None]:
    """Return the second judge's score of each image; nothing without one."""
    if judge is None:
        return []
    if isinstance(judge, Running):
        return score(context, items, judge)[0]
    return judge.values(context.pool.run(Worker.check, items, context.resolution, judge))


def measure_diversity(context: StageContext, groups: list[list[bytes]]) -> dict[str, float]:
    """Return the `diversity` of groups of images of one prompt each, at this resolution."""
    schedule = load_config(context.inputs.model).image_tokenizer_config.schedule_for(context.resolution)
    return diversity(groups, schedule)


def needs_reference(context: StageContext, method: OnlineMethod) -> bool:
    """Tell whether the workers score the reference: if the loss takes it, and the learner does not score it itself."""
    is_taken = context.config.rl.kl > 0 or "reference" in method.takes
    return is_taken and not context.config.adapter.scores_in_learner


def rows_of(
    context: StageContext,
    batch: DrawnBatch,
    method: OnlineMethod,
    learned: int,
    references: list[ImageScore] | None,
) -> list[dict]:
    """Return the images as rows of a batch, with the log-probabilities that the learner takes.

    ``learned`` counts the optimizer steps behind the weights that drew; ``references`` are the reference's scores, see
    `needs_reference`.
    """
    return [
        {
            "prompt_id": sample.prompt.id,
            "prompt": sample.prompt.text,
            "reply": sample.prompt.reply,
            "resolution": sample.resolution,
            "bits": sample.bits,
            "seed": sample.seed,
            "sampling": json.dumps(sample.sampling, sort_keys=True),
            "tau": context.config.sampling.tau,
            "version": sample.version,
            "learner_step": learned,
            "group": batch.groups[i],
            "reward": batch.rewards[i],
            "advantage": list(batch.advantages[i]),
            "sampler_by_scale": sample.log_probs if "sampler" in method.takes else None,
            "reference_by_scale": references[i].by_scale if references is not None else None,
        }
        for i, sample in enumerate(batch.samples)
    ]
