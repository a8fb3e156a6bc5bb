"""Verify a run's files before resuming. A step with a corrupt file is redone, and so is every later step."""

import shutil
from pathlib import Path

from vargpt_rl.data.preferences import read_table
from vargpt_rl.data.rollouts import read_rollouts
from vargpt_rl.driver.judging import REWARDS, read_rewards
from vargpt_rl.driver.run import Run
from vargpt_rl.driver.sampling import SAMPLES
from vargpt_rl.driver.session import Step
from vargpt_rl.storage.checkpoint import check_checkpoint
from vargpt_rl.storage.images import CANDIDATES

TABLES = {Step.AFTER_SFT: "-held-out", Step.PROPOSE: f"-{CANDIDATES}", Step.PAIR: ""}
"""Steps of an iteration that write a preference table, and the suffix of its name. Without a method that learns from
pairs, none is written after SFT."""


def _check(run: Run, step: str) -> None:
    """ValueError or FileNotFoundError naming a file that is not as the step left it."""
    weights = run.directory / "checkpoints" / step.replace("/", "-")
    for directory in sorted([*weights.glob("step-*"), *weights.glob("final")]):
        check_checkpoint(directory)
    iteration, _, name = step.partition("/")
    if name in (Step.PROPOSE, Step.PAIR) or (name == Step.AFTER_SFT and "pairs" in run.state["steps"][step]):
        read_table(run.directory / "preferences" / f"{iteration}{TABLES[Step(name)]}.parquet")
    if name in (Step.SAMPLE, Step.JUDGE) and f"{iteration}/{Step.PAIR}" not in run.state["steps"]:
        folder = run.directory / "rollouts" / iteration
        rollouts = read_rollouts(folder / SAMPLES)
        if name == Step.JUDGE and run.state["steps"][step]:
            read_rewards(folder / REWARDS, rollouts)


def check_steps(run: Run) -> None:
    """Rewind to the first recorded step with a corrupt or missing file, and note it. Such files are removed."""
    problems: dict[str, str] = {}
    for name in list(run.files.entries):
        step = str(run.files.entries[name].get("step"))
        problem = None if _is_used_up(run, name) else run.files.problem(name)
        if problem and step in run.state["steps"]:
            problems.setdefault(step, problem)
            _remove(run.directory / name)
            del run.files.entries[name]
    for step in list(run.state["steps"]):
        try:
            if step in problems:
                raise ValueError(problems[step])
            _check(run, step)
        except (ValueError, OSError) as error:
            run.rewind(step, str(error))
            return


def _is_used_up(run: Run, name: str) -> bool:
    """Tell whether a file is gone because its step's successor used it, which may not be recorded yet.

    Samples and rewards are deleted once their pairs are recorded, batches of an online method once it is, rows of a
    grid once it is composed.
    """
    if (run.directory / name).exists():
        return False
    kind, stage, *_ = Path(name).parts
    if kind == "rollouts":
        done = run.state["steps"]
        return f"{stage}/{Step.PAIR}" in done or stage in {step.replace("/", "-") for step in done}
    return kind == "samples" and (run.directory / kind / f"{stage}.png").exists()


def _remove(path: Path) -> None:
    """Remove a file, or whatever else has its name; of a kept model everything, because it is made again as a whole."""
    place = path.parent if path.parent.parent.name == "best" else path
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
