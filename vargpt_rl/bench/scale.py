"""Measure the driver's and the learner's bookkeeping: ``python -m vargpt_rl.bench.scale [pairs=[1000,10000,180000]]``.

For each number of pairs, in ascending order and without a model: CPU seconds of planning the samples, building the
pairs, writing the preference table, describing it, planning the order in which DPO uses each pair once, and handing out
batches; and the process's peak memory so far. All should grow in proportion to the pairs.

``steps=true`` is a dry run instead: the driver's own steps (`vargpt_rl.bench.dry_run`) for each number of prompts.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import TypeVar

import numpy as np

from actors.batches import BatchJob, Call
from learners.pairs import PairOrder, PairTable
from rewards.preferences import PreferencePair, check_books, external_winner
from vargpt_rl.bench.dry_run import BITS, RESOLUTION, SCORE, dry_run, random_sample
from vargpt_rl.bench.harness import results_table
from vargpt_rl.common.command import run_command
from vargpt_rl.common.console import print_table
from vargpt_rl.common.settings import Count
from vargpt_rl.data.pair_statistics import describe
from vargpt_rl.data.preferences import read_table, write_table
from vargpt_rl.data.samples import Prompt, Sample, Winner
from vargpt_rl.driver.seeds import apportion, seeds_for

STEP = 384
"""Pairs of a DPO step, the paper's at 256 px."""
BATCH = 16

Result = TypeVar("Result")


@dataclass
class ScaleSettings:
    """Numbers of pairs to measure."""

    pairs: list[Count] = field(default_factory=lambda: [1_000, 10_000, 180_000])
    """Numbers of pairs; 180,000 are the paper's at 256 px."""
    steps: bool = False
    """Run the driver's steps instead, with stand-ins that answer at once for the workers."""

    def __post_init__(self):
        if not self.pairs:
            raise ValueError("pairs=[]: expected one or more")


def plan(count: int) -> tuple[list[int], np.ndarray]:
    """Plan seeds and samplers."""
    return seeds_for(count, 0), apportion(count, [0.5, 0.5], 0)


def make_samples(count: int) -> tuple[list[Sample], dict[str, Winner]]:
    """Return samples and winners with random bits: one of each for each prompt."""
    random = np.random.default_rng(0)
    prompts = [Prompt(f"prompt-{i}", f"a picture of number {i}") for i in range(count)]
    samples = [random_sample(random, prompt, seed) for seed, prompt in enumerate(prompts)]
    return samples, {prompt.id: Winner(prompt, random.bytes(BITS), RESOLUTION, "better") for prompt in prompts}


def build(samples: list[Sample], winners: dict[str, Winner]) -> list[PreferencePair]:
    """Build pairs and check that every sample is accounted for."""
    pairs, dropped = external_winner(samples, winners, None, None)
    check_books(samples, pairs, dropped)
    return pairs


def write(path: Path, pairs: list[PreferencePair]) -> None:
    """Write the preference table."""
    origin = {"samples": len(pairs), "prompts": len(pairs), "prompts_without_winner": 0, "dropped_by_reason": {}}
    write_table(path, [pair.row(SCORE, SCORE, 1) for pair in pairs], origin)


def order(table: PairTable) -> int:
    """Plan the steps that use each pair once; return the number of places in them."""
    return len(list(PairOrder(table, -(-len(table) // STEP), STEP, 0)))


def hand_out(count: int) -> int:
    """Hand out all items in batches and take a result for each; return the number of results."""
    job = BatchJob(list(range(count)), BATCH, repeatable=True)
    for batch in job.next_batches([]):
        job.finish(Call(None, job, batch, time.monotonic()), job.batches[batch])  # type: ignore[arg-type]
        job.next_late([])
    return job.items_done


def measure(count: int, folder: Path) -> dict[str, float]:
    """Measure all parts with ``count`` pairs; return CPU seconds by part, and MiB of peak memory."""
    found: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Result]) -> Result:
        began = time.process_time()
        result = work()
        found[name] = time.process_time() - began
        return result

    path = folder / f"{count}.parquet"
    timed("plan", partial(plan, count))
    samples, winners = make_samples(count)
    pairs = timed("build", partial(build, samples, winners))
    timed("write table", partial(write, path, pairs))
    timed("describe", lambda: describe(read_table(path)))
    timed("pair order", partial(order, PairTable(path)))
    timed("batches", partial(hand_out, count))
    return found | {"MiB": getrusage(RUSAGE_SELF).ru_maxrss / 1024}


def bench(settings: ScaleSettings) -> None:
    """Print a row per part, with a column per number of pairs."""
    counts = sorted(settings.pairs)
    if settings.steps:
        for count in counts:
            with tempfile.TemporaryDirectory() as folder:
                print_table(dry_run(count, Path(folder)))
        return
    table = results_table("CPU seconds", ("", *(f"{count:,} pairs" for count in counts)), left=("",))
    with tempfile.TemporaryDirectory() as folder:
        columns = [measure(count, Path(folder)) for count in counts]
    for name in columns[0]:
        table.add_row(name, *(f"{column[name]:.0f}" if name == "MiB" else f"{column[name]:.3f}" for column in columns))
    print_table(table)


if __name__ == "__main__":
    sys.exit(run_command(ScaleSettings, bench))
