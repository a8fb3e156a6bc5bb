"""What a run has on disk is checked before it goes on: a step with a damaged file is done again, and all after it."""

from vargpt_rl.data.preferences import read_table
from vargpt_rl.driver.run import Run
from vargpt_rl.storage.checkpoint import check_checkpoint

TABLES = {"after_sft": "-held-out", "pairs": ""}
"""Steps of an iteration that write a preference table, and what its name ends in."""


def _check(run: Run, step: str) -> None:
    """ValueError that names a file which is not as the step left it."""
    weights = run.directory / "checkpoints" / step.replace("/", "-")
    for directory in sorted([*weights.glob("step-*"), *weights.glob("final")]):
        check_checkpoint(directory)
    iteration, _, what = step.partition("/")
    if what in TABLES:
        read_table(run.directory / "preferences" / f"{iteration}{TABLES[what]}.parquet")


def check_steps(run: Run) -> None:
    """Go back before the first recorded step with a damaged file, and say so."""
    for step in list(run.state["steps"]):
        try:
            _check(run, step)
        except (ValueError, FileNotFoundError) as error:
            run.rewind(step, str(error))
            return
