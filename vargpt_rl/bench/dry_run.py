"""Dry run of the driver's long steps: sampling, encoding winners, judging, reference scoring and the table of pairs.

The steps are the driver's own, with their parts on disk and their records. Workers and rewards are stand-ins that
answer at once, so all that is measured is the driver's. Used by ``python -m vargpt_rl.bench.scale steps=true``.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from rich.table import Table

from actors.pool import RolloutPool
from actors.weights import SwapReport
from actors.worker import EncodedImage, ImageScore, PromptedBits
from configs.load import load_config
from learners.group import LearnerGroup
from rewards import Reward
from rewards.combined import KeptRewards, Running
from rewards.preferences import external_winner
from vargpt_rl.bench.harness import results_table
from vargpt_rl.common.memory import forget_peak, peak_memory
from vargpt_rl.data.quarantine import Quarantine
from vargpt_rl.data.samples import Prompt, Sample
from vargpt_rl.data.sources import Source
from vargpt_rl.driver.inputs import Inputs
from vargpt_rl.driver.judging import judge
from vargpt_rl.driver.pairs import pair
from vargpt_rl.driver.run import Run
from vargpt_rl.driver.sampling import sample
from vargpt_rl.driver.session import Session, StageContext, Step
from vargpt_rl.driver.weights import WeightSync
from vargpt_rl.storage.checkpoint import Policy, save_checkpoint

RESOLUTION = 256
BITS = 2084
"""Packed bytes of an image of 256 px: 521 tokens of 32 bits."""
SCALES = 10
SCORE = ImageScore(-10.0 * SCALES, [-10.0] * SCALES, [0.5] * SCALES)
"""A reference score, the same for each image."""
SAMPLING = "sample, encode winners"
RESUMED = "the same, resumed after the last part"
JUDGING = "judge samples and winners"
PAIRING = "score and write pairs"


def random_sample(
    random: np.random.Generator, prompt: Prompt, seed: int, version: int = 1, name: str = "sft/final"
) -> Sample:
    """Return a sample with random bits."""
    return Sample(prompt, random.bytes(BITS), RESOLUTION, seed, {"cfg": 3.0}, version, name, [-1.0] * SCALES)


class InstantWorkers:
    """Stands in for `RolloutPool`: random bits, one score."""

    def __init__(self) -> None:
        self.config: Any = None
        self.version = 0
        self.random = np.random.default_rng(0)
        self.answers: dict[str, Callable[..., list]] = {
            "generate_images": self.generate_images,
            "encode": self.encode,
            "reward": self.reward,
            "score": self.score,
        }

    def run(self, method: Callable[..., list], items: list, *args: Any, batch_size: int | None = None) -> list:
        return self.answers[method.__name__](items, *args)

    def publish(self, path: Path, version: int) -> SwapReport:
        self.version = version
        return SwapReport(version, "", bytes=0, seconds=0.0, gbytes_per_s=0.0, workers=1, verified=True)

    def generate_images(
        self, jobs: list[tuple[Prompt, int]], resolution: int, sampling: object, name: str
    ) -> list[Sample]:
        return [random_sample(self.random, prompt, seed, self.version, name) for prompt, seed in jobs]

    def encode(self, keys: list[str], resolution: int) -> list[EncodedImage]:
        features = np.zeros((32, resolution // 16, resolution // 16), np.float16)
        return [EncodedImage(key, self.random.bytes(BITS), features) for key in keys]

    def reward(self, items: list[PromptedBits], resolution: int, reward: object) -> list[float]:
        return self.random.random(len(items)).tolist()

    def score(self, items: list[PromptedBits], *args: object) -> list[ImageScore]:
        return [SCORE] * len(items)


class InstantReward:
    """Stands in for rewards that run in processes of their own."""

    def renewed(self) -> "InstantReward":
        return self

    def report(self) -> dict[str, dict[str, Any]]:
        return {}


class InstantRewards(KeptRewards):
    """Rewards without processes."""

    def use(self, reward: Reward) -> Running:
        return cast(Running, InstantReward())


class WinnersAlone(Source):
    """A source that has a winner for each prompt."""

    def load(self, key: str, side: int) -> Image.Image:
        raise NotImplementedError

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        return []

    def winner_key(self, prompt: Prompt) -> str | None:
        return f"{prompt.id}.png"


def unused_reward(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
    """Stand for a reward; `InstantWorkers` answer for it."""
    raise NotImplementedError


@dataclass
class StepCost:
    """Seconds and CPU seconds of a step, and the most bytes that the process had in memory during it."""

    name: str
    seconds: float
    cpu: float
    peak: int


def enter_iteration(count: int, folder: Path) -> StageContext:
    """Return the first iteration of a new run of ``count`` prompts in ``folder``."""
    config = load_config(
        [
            f"runs={folder}",
            "name=dry",
            f"resolutions=[{RESOLUTION}]",
            "iterations=1",
            "align.methods=[dpo]",
            f"preference.count={count}",
            "reward.path=null",
            "sft.checkpoints=[]",
            "rollout.batch_size=16",
            "tracking.table_rows=0",
        ]
    )
    run = Run(folder / "dry", {})
    pool = cast(RolloutPool, InstantWorkers())
    inputs = Inputs(
        model="",
        source=WinnersAlone(),
        quarantine=Quarantine(folder / "quarantine.jsonl"),
        builder=external_winner,
        reward=unused_reward,
        judge=None,
        prompts=[Prompt(f"prompt-{i}", f"a picture of number {i}") for i in range(count)],
        max_bad_fraction=0.5,
        stream=None,
    )
    session = Session(
        config=config,
        inputs=inputs,
        run=run,
        pool=pool,
        text=None,
        weights=WeightSync(pool, None, run),
        learners=cast(LearnerGroup, None),  # these steps train nothing
        rewards=InstantRewards(),
    )
    return session.iteration(0)


def measure_steps(context: StageContext) -> list[StepCost]:
    """Run the steps and measure each; sampling also as it resumes when all of its parts are there."""
    final = context.checkpoint(Step.SFT) / "final"
    policy = Policy("", (save_checkpoint(final, {"weight": torch.zeros(1)}),))
    found: list[StepCost] = []

    def timed(name: str, work: Callable[[], dict]) -> dict:
        forget_peak()
        began, spent = time.perf_counter(), time.process_time()
        result = work()
        found.append(StepCost(name, time.perf_counter() - began, time.process_time() - spent, peak_memory()))
        return result

    def sample_twice(context: StageContext) -> dict:
        timed(SAMPLING, lambda: sample(context, policy))
        return timed(RESUMED, lambda: sample(context, policy))

    context.step(Step.SAMPLE, sample_twice)
    timed(JUDGING, lambda: context.step(Step.JUDGE, judge))
    timed(PAIRING, lambda: context.step(Step.PAIR, pair, policy, {}))
    return found


def dry_run(count: int, folder: Path) -> Table:
    """Run the steps for ``count`` prompts in ``folder``; return a table of seconds and peak memory."""
    forget_peak()
    context = enter_iteration(count, folder)
    before = peak_memory()
    table = results_table(f"{count:,} prompts", ("", "seconds", "CPU seconds", "peak MiB"), left=("",))
    table.add_row("before", "", "", f"{before / 2**20:.0f}")
    for each in measure_steps(context):
        table.add_row(each.name, f"{each.seconds:.1f}", f"{each.cpu:.1f}", f"{each.peak / 2**20:.0f}")
    return table
