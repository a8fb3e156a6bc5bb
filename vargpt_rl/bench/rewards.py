"""What a reward that hangs costs the others: ``python -m vargpt_rl.bench.rewards [images=... timeout_s=...]``.

Images of the shapes world are scored batch by batch, once by two healthy rewards and once by the same two beside one
that never answers. That one costs at most `rewards.processes.MAX_RESTARTS` + 1 deadlines and as many starts of a
process, then it is given up; so the ratio depends on how many images there are. All processes are started inside the
measured time, as in a run. Exit code 1 if a healthy reward missed an image.
"""

import sys
import time
from dataclasses import dataclass

import numpy as np
import ray
from rich.box import SIMPLE_HEAD
from rich.table import Table

from rewards.combined import WeightedSum, scorers
from vargpt_rl.common.command import run_command
from vargpt_rl.common.console import wide_console
from vargpt_rl.data.shapes import render, sample_scene
from vargpt_rl.loop import connect

HEALTHY = {"checker": {"path": "rewards.shapes:shapes_reward"}, "sharpness": {"path": "rewards.technical:sharpness"}}


@dataclass
class Bench:
    """``timeout_s`` is the hanging reward's deadline for a batch; ``side`` in pixels."""

    images: int = 2048
    side: int = 128
    batch: int = 64
    timeout_s: float = 1.0


def measure(bench: Bench, terms: dict[str, dict]) -> tuple[float, dict[str, dict]]:
    """Images a second, and what became of them by reward."""
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(bench.images)]
    images = [render(scene, bench.side, "clean", rng) for scene in scenes]
    prompts, began = [scene.caption for scene in scenes], time.perf_counter()
    with scorers(WeightedSum(terms)) as running:
        for first in range(0, bench.images, bench.batch):
            running(images[first : first + bench.batch], prompts[first : first + bench.batch])
        report = running.report()
    return bench.images / (time.perf_counter() - began), report


def compare(bench: Bench) -> int:
    """Print both speeds and their ratio; return 1 if a healthy reward did not score every image."""
    hanging = {"path": "vargpt_rl.bench.hanging:hang", "required": False, "timeout_s": bench.timeout_s, "retries": 0}
    connect()
    try:
        alone, report_alone = measure(bench, HEALTHY)
        beside, report = measure(bench, HEALTHY | {"hangs": hanging})
    finally:
        ray.shutdown()
    lost = ", ".join(f"{reason}: {count}" for reason, count in report["hangs"]["unscored"].items())
    table = Table(title=f"{bench.images} images of {bench.side} px", title_justify="left", box=SIMPLE_HEAD)
    for column in ("rewards", "images/s", "scored by each", "lost by the one that hangs"):
        table.add_column(column, justify="left" if column == "rewards" else "right")
    table.add_row("two healthy ones", f"{alone:.1f}", _scored(report_alone), "-")
    table.add_row("the two, and one that hangs", f"{beside:.1f}", _scored(report), lost)
    console = wide_console()
    console.print(table)
    console.print(f"ratio {beside / alone:.3f}: {bench.images / beside - bench.images / alone:.1f} s more")
    everything = all(term["scored"] == bench.images for name, term in report.items() if name in HEALTHY)
    return 0 if everything else 1


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return its exit code."""
    return run_command(Bench, compare, arguments)


def _scored(report: dict[str, dict]) -> str:
    return ", ".join(str(report[name]["scored"]) for name in HEALTHY)


if __name__ == "__main__":
    sys.exit(main())
