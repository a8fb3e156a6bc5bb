"""Parts of studies that align one SFT policy in several ways: sizes, settings, forks of a run, cells of tables."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vargpt_rl.common.command import CommandFailed
from vargpt_rl.common.settings import Count
from vargpt_rl.driver.run import STATE
from vargpt_rl.driver.session import Step
from vargpt_rl.driver.state import read_state, write_state
from vargpt_rl.evaluate.paired import ScoredImage, paired_gain
from vargpt_rl.storage.files import atomic_dir

ITERATION = "iter-00"
SHARED = (
    f"checkpoints/{ITERATION}-sft",
    f"preferences/{ITERATION}-held-out.parquet",
    f"evaluations/{ITERATION}-{Step.AFTER_SFT}.jsonl",
)
"""Files that the steps after SFT's evaluation need from earlier steps."""
ADAPTER = "checkpoints/adapter"
"""The first weights of an adapter, needed too by a run that trains one."""


@dataclass
class StudySizes:
    """Model and sizes of a study."""

    checkpoint: str = "tiny"
    """Model that SFT starts from."""
    resolution: Count = 256
    """Pixels a side."""
    sft_steps: Count = 70
    """Optimizer steps of SFT, of 16 images each."""
    dpo_steps: Count = 24
    """Optimizer steps of DPO, and of a control, of 8 pairs each."""
    pairs: Count = 160
    """Pairs of DPO, one sample of each prompt; their winners are a control's images."""
    updates: Count = 10
    """Updates of online methods."""
    held_out: Count = 240
    """Held-out images at each moment."""
    ranks: Count = 1
    """Learner ranks; there are as many rollout workers."""


def shared_overrides(sizes: StudySizes, runs: str, name: str, seed: int) -> list[str]:
    """Return the loop's settings that all runs of a study share: one iteration at one resolution."""
    return [
        f"runs={runs}",
        f"name={name}",
        f"seed={seed}",
        f"checkpoint={sizes.checkpoint}",
        "stages=[align]",
        f"resolutions=[{sizes.resolution}]",
        "iterations=1",
        f"sft.records={16 * sizes.sft_steps}",
        f"sft.recipe.steps={sizes.sft_steps}",
        "sft.recipe.batch=16",
        "sft.recipe.micro_batch=4",
        f"preference.count={sizes.pairs}",
        f"dpo.recipe.steps={sizes.dpo_steps}",
        "dpo.recipe.batch=8",
        "dpo.recipe.micro_batch=2",
        f"rl.recipe.steps={sizes.updates}",
        f"learner.ranks={sizes.ranks}",
        f"rollout.workers={sizes.ranks}",
        f"evaluation.prompts={sizes.held_out}",
        "tracking.wandb=disabled",
        "tracking.best=null",
        "~at",
    ]


def fork(source: Path, target: Path) -> None:
    """Copy ``source`` as it was after SFT to a new run directory, whose settings may differ."""
    if target.exists():
        return
    state, _, _ = read_state(source / STATE)
    steps = list(state["steps"])
    last = steps.index(f"{ITERATION}/{Step.AFTER_SFT}")
    state["steps"] = {step: state["steps"][step] for step in steps[: last + 1]}
    state |= {"config": None, "summary": None, "logs": {}}
    with atomic_dir(target) as unfinished:
        for name in [*SHARED, *([ADAPTER] if (source / ADAPTER).exists() else [])]:
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (source / name).is_dir() else shutil.copy2
            copy(source / name, unfinished / name)
        write_state(unfinished / STATE, state)


def run_loop(arguments: list[str], log: Path) -> None:
    """Run the loop, its output in ``log``. Raises CommandFailed with its last lines if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        code = subprocess.run([sys.executable, "-m", "vargpt_rl.loop", *arguments], stdout=output, stderr=output)
    if code.returncode:
        last = "\n".join(log.read_text().splitlines()[-5:])
        raise CommandFailed(f"exit code {code.returncode} of the loop with {' '.join(arguments)}; {log} ends:\n{last}")


def pooled_gain(pairs: Sequence[tuple[list[ScoredImage], list[ScoredImage]]]) -> str:
    """Format the gain of images over their baseline, paired image by image, given both of each seed.

    The first error is over the images of all seeds, those of one prompt together, the second, in brackets, over the
    seeds' mean gains.
    """
    pooled: list[ScoredImage] = []
    base: list[ScoredImage] = []
    by_seed = []
    for seed, (images, baseline) in enumerate(pairs):
        gain = paired_gain(images, baseline)
        by_seed += [gain[0]] if gain else []
        pooled += [_of_seed(image, seed) for image in images]
        base += [_of_seed(image, seed) for image in baseline]
    total = paired_gain(pooled, base)
    if total is None:
        return "-"
    over_seeds = f" ({np.std(by_seed, ddof=1) / np.sqrt(len(by_seed)):.3f})" if len(by_seed) > 1 else ""
    return f"{total[0]:+.3f} ± {total[1]:.3f}{over_seeds}"


def _of_seed(image: ScoredImage, seed: int) -> ScoredImage:
    """Return the image under an id that no other seed has."""
    return ScoredImage(prompt_id=f"{seed}/{image.prompt_id}", prompt=image.prompt, seed=image.seed, score=image.score)


def spread(values: list[float | None], digits: int = 3) -> str:
    """Format a mean, with the standard deviation over seeds."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    deviation = f" ± {np.std(known, ddof=1):.{digits}f}" if len(known) > 1 else ""
    return f"{np.mean(known):.{digits}f}{deviation}"
