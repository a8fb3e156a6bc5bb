"""Online RL on image tokens: draw a group of images of each prompt, judge them, learn from them, swap, repeat.

The learner stays up: it takes a batch per file that appears in a folder, and saves its weights after each. What a
method learns from a group, and its loss: `learners.methods`. Groups of equal reward say nothing; they are counted and
replaced by other prompts' (DAPO, arXiv 2503.14476).
"""

import json
import math
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import ray

from actors.worker import Worker
from learners.group import RunningJob
from learners.jobs import PolicyGradientJob
from learners.methods import ONLINE, OnlineMethod
from rewards.combined import Running
from vargpt_rl.data.policy_batches import batch_path, write_policy_batch
from vargpt_rl.data.samples import Prompt, Sample
from vargpt_rl.driver.judging import running, score
from vargpt_rl.driver.sampling import generate
from vargpt_rl.driver.seeds import Purpose, seeds_for
from vargpt_rl.driver.session import StageContext
from vargpt_rl.driver.training import follow, random_probe
from vargpt_rl.storage.checkpoint import Policy

LOOK_S = 0.5
"""Longest wait, in seconds, between two looks at the learner."""


@dataclass
class DrawnBatch:
    """Drawings of one update, with what became of their groups."""

    samples: list[Sample] = field(default_factory=list)
    rewards: list[float | None] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    all_rewards: list[float] = field(default_factory=list)
    """Rewards of all drawings, those of equal groups included."""


def train_online(it: StageContext, policy: Policy, method: str) -> dict:
    """Train an online method from ``policy``."""
    settings = it.config.rl
    batches = it.run.directory.resolve() / "rollouts" / f"{it.name}-{method}"
    job = PolicyGradientJob(
        start=policy,
        batches=batches,
        recipe=settings.recipe,
        rl=settings,
        output=it.checkpoint(method),
        seed=it.config.seed + it.index,
        probe=random_probe(it),
        method=method,
    )
    batches.mkdir(parents=True, exist_ok=True)
    training = it.session.learners.start(job, follow(it, method, settings.recipe, it.config.learner.ranks))
    totals: Counter[str] = Counter()
    means: list[float] = []
    with running(it.inputs.reward) as reward:
        assert reward is not None, "the settings require a reward for online methods"
        for number in range(math.ceil(settings.recipe.steps / settings.updates)):
            path = batch_path(batches, number)
            if path.exists():  # drawn before an interruption
                continue
            found = _write_batch(it, policy, training, reward, method, number, path)
            totals.update(found["counts"])
            means.append(found["reward"])
    result = training.result()
    shutil.rmtree(batches)
    if means:
        result |= {"reward_first": means[0], "reward_last": means[-1]}
    return result | {"groups": dict(totals)}


def _write_batch(
    it: StageContext, policy: Policy, training: RunningJob, reward: Running, method: str, number: int, path: Path
) -> dict:
    """Draw, judge and write one batch with the learner's weights; return its mean reward and counts."""
    settings = it.config.rl
    learned = max(0, number - settings.staleness) * settings.updates
    began = time.perf_counter()
    current = _wait_for(it, training, policy, it.checkpoint(method), learned)
    waited = time.perf_counter()
    swapped = it.swap_to(current)
    drew = time.perf_counter()
    batch = draw_batch(it, reward, number, ONLINE[method])
    judged = time.perf_counter()
    rows = _rows(it, policy, batch, learned, ONLINE[method])
    write_policy_batch(path, rows)
    mean = float(np.mean(batch.all_rewards))
    metrics = {
        "reward": mean,
        "reward_std": float(np.std(batch.all_rewards)),
        "version": swapped["version"],
        "staleness": number * settings.updates - learned,
        "time/wait": waited - began,
        "time/swap": drew - waited,
        "time/draw_and_judge": judged - drew,
        "time/score": time.perf_counter() - judged,
        **{f"groups/{name}": count for name, count in batch.counts.items()},
    }
    it.log(f"{method}/rollout", number + 1, metrics)
    return {"reward": mean, "counts": batch.counts}


def _wait_for(it: StageContext, training: RunningJob, policy: Policy, output: Path, learned: int) -> Policy:
    """Return the policy after ``learned`` optimizer steps, once the learner has saved it; drop older weights."""
    if not learned:
        return policy
    weights = output / f"step-{learned:06d}"
    while not weights.exists():
        waiting = training.look()
        if not waiting and not weights.exists():
            raise RuntimeError(f"the learner ended before step {learned}: {weights} is missing")
        ray.wait(waiting, timeout=LOOK_S)
    for old in sorted(output.glob("step-*"))[:-2]:
        shutil.rmtree(old)
    return policy.plus(weights)


def draw_batch(it: StageContext, reward: Running, number: int, method: OnlineMethod) -> DrawnBatch:
    """Draw groups until ``rl.prompts`` of them have different rewards, in at most ``1 + rl.refills`` rounds.

    ValueError if no group at all has: the reward says nothing about this policy's images.
    """
    settings = it.config.rl
    batch = DrawnBatch()
    for refill in range(1 + settings.refills):
        missing = settings.prompts - batch.counts["used"]
        if missing <= 0:
            break
        seed = seeds_for(1, it.config.seed, it.index, Purpose.ONLINE, number, refill)[0]
        _draw_groups(it, reward, batch, _prompts(it, missing, seed), seed, method)
    if not batch.samples:
        seen = sorted(set(batch.all_rewards))[:3]
        raise ValueError(
            f"reward.path={it.config.reward.path}: all rewards are equal in each of {batch.counts['drawn']} groups of "
            f"{settings.group} images (such as {seen}): expected rewards that tell images of a prompt apart"
        )
    return batch


def _prompts(it: StageContext, count: int, seed: int) -> list[Prompt]:
    """Return prompts of the file, or of the source, at random."""
    if it.inputs.prompts is None:
        return it.source.prompts("train", count, seed)
    order = np.random.default_rng(seed).permutation(len(it.inputs.prompts))
    return [it.inputs.prompts[i] for i in order[:count]]


def _draw_groups(
    it: StageContext, reward: Running, batch: DrawnBatch, prompts: list[Prompt], seed: int, method: OnlineMethod
) -> None:
    """Draw a group of images of each prompt and add those that ``method`` learns from to ``batch``."""
    size = it.config.rl.group
    repeated = [prompt for prompt in prompts for _ in range(size)]
    samples = generate(it, repeated, seeds_for(len(repeated), seed), f"{it.name}-online")
    values, _ = score(it, [(sample.prompt, sample.bits) for sample in samples], reward)
    batch.all_rewards += [value for value in values if value is not None]
    for at in range(0, len(samples), size):
        group = values[at : at + size]
        batch.counts["drawn"] += 1
        batch.counts["unscored images"] += sum(value is None for value in group)
        chosen = method.choose(group, it.config.rl)
        if chosen is None:
            batch.counts["equal"] += 1
            continue
        batch.counts["used"] += 1
        batch.samples += [samples[at + i] for i in chosen]
        batch.rewards += [group[i] for i in chosen]
        batch.advantages += chosen.values()


def _rows(it: StageContext, policy: Policy, batch: DrawnBatch, learned: int, method: OnlineMethod) -> list[dict]:
    """Return the drawings as rows of a batch, with the log-probabilities that the learner takes."""
    tau = it.config.sampling.tau
    reference = None
    if it.config.rl.kl or "reference" in method.takes:
        it.swap_to(policy)
        items = [(sample.prompt, sample.bits) for sample in batch.samples]
        size = it.config.rl.recipe.micro_batch
        reference = it.pool.run(Worker.score, items, it.resolution, tau, batch_size=size)
    return [
        {
            "prompt_id": sample.prompt.id,
            "prompt": sample.prompt.text,
            "reply": sample.prompt.reply,
            "resolution": sample.resolution,
            "bits": sample.bits,
            "seed": sample.seed,
            "sampling": json.dumps(sample.sampling, sort_keys=True),
            "tau": tau,
            "version": sample.version,
            "learner_step": learned,
            "reward": batch.rewards[i],
            "advantage": batch.advantages[i],
            "sampler_by_scale": sample.log_probs if "sampler" in method.takes else None,
            "reference_by_scale": reference[i].by_scale if reference else None,
        }
        for i, sample in enumerate(batch.samples)
    ]
