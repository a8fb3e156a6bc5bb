"""Measure what a hanging reward costs the others: ``python -m vargpt_rl.bench.rewards [images=... timeout_s=...]``.

Images of the shapes world are scored batch by batch, once by two healthy rewards and once by the same two and one that
never answers. The hanging one costs at most `rewards.processes.MAX_RESTARTS` + 1 deadlines and as many process starts
before it is disabled, so the ratio depends on the number of images. As in a run, the measured time includes starting
all processes. Exit code 1 if a healthy reward missed an image.
"""

import sys
import time
from dataclasses import dataclass

import numpy as np
import ray

from actors.cluster import connect
from rewards.combined import WeightedSum, scorers
from vargpt_rl.bench.harness import results_table
from vargpt_rl.common.command import run_command
from vargpt_rl.common.console import print_table, wide_console
from vargpt_rl.common.settings import Count, Seconds
from vargpt_rl.data.shapes import render, sample_scene

HEALTHY = {"checker": {"path": "rewards.shapes:shapes_reward"}, "sharpness": {"path": "rewards.technical:sharpness"}}


@dataclass
class RewardBenchSettings:
    """Settings of the benchmark."""

    images: Count = 2048
    side: Count = 128
    """Side of an image in pixels."""
    batch: Count = 64
    timeout_s: Seconds = 1.0
    """The hanging reward's deadline for a batch, in seconds."""


def measure(settings: RewardBenchSettings, terms: dict[str, dict]) -> tuple[float, dict[str, dict]]:
    """Return the images scored per second, and a report per reward."""
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(settings.images)]
    images = [render(scene, settings.side, "clean", rng) for scene in scenes]
    prompts = [scene.caption for scene in scenes]
    began = time.perf_counter()
    with scorers(WeightedSum(terms)) as running:
        for first in range(0, settings.images, settings.batch):
            running(images[first : first + settings.batch], prompts[first : first + settings.batch])
        report = running.report()
    return settings.images / (time.perf_counter() - began), report


def compare(settings: RewardBenchSettings) -> int:
    """Print both speeds and their ratio; return 1 if a healthy reward did not score every image."""
    hanging = {"path": "vargpt_rl.bench.hanging:hang", "required": False, "timeout_s": settings.timeout_s, "retries": 0}
    connect()
    try:
        alone, report_alone = measure(settings, HEALTHY)
        with_hanging, report = measure(settings, HEALTHY | {"hangs": hanging})
    finally:
        ray.shutdown()
    lost = ", ".join(f"{reason}: {count}" for reason, count in report["hangs"]["unscored"].items())
    columns = ("rewards", "images/s", "scored by each", "not scored by the hanging one")
    table = results_table(f"{settings.images} images of {settings.side} px", columns, left=("rewards",))
    table.add_row("two healthy", f"{alone:.1f}", _scored(report_alone), "-")
    table.add_row("two healthy, one hanging", f"{with_hanging:.1f}", _scored(report), lost)
    console = wide_console()
    extra = settings.images / with_hanging - settings.images / alone
    print_table(table, console)
    console.print(f"ratio {with_hanging / alone:.3f}: {extra:.1f} s more")
    complete = all(term["scored"] == settings.images for name, term in report.items() if name in HEALTHY)
    return 0 if complete else 1


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return its exit code."""
    return run_command(RewardBenchSettings, compare, arguments)


def _scored(report: dict[str, dict]) -> str:
    return ", ".join(str(report[name]["scored"]) for name in HEALTHY)


if __name__ == "__main__":
    sys.exit(main())
