"""Verify a run's files before resuming. A step with a corrupt file is redone, and so is every later step."""

from vargpt_rl.data.preferences import read_table
from vargpt_rl.data.rollouts import read_rollouts
from vargpt_rl.driver.judging import REWARDS, read_rewards
from vargpt_rl.driver.run import Run
from vargpt_rl.driver.sampling import SAMPLES
from vargpt_rl.driver.session import Step
from vargpt_rl.storage.checkpoint import check_checkpoint

TABLES = {Step.AFTER_SFT: "-held-out", Step.PAIR: ""}
"""Steps of an iteration that write a preference table, and the suffix of its name."""


def _check(run: Run, step: str) -> None:
    """ValueError or FileNotFoundError naming a file that is not as the step left it."""
    weights = run.directory / "checkpoints" / step.replace("/", "-")
    for directory in sorted([*weights.glob("step-*"), *weights.glob("final")]):
        check_checkpoint(directory)
    iteration, _, name = step.partition("/")
    if name in TABLES:
        read_table(run.directory / "preferences" / f"{iteration}{TABLES[Step(name)]}.parquet")
    if name in (Step.SAMPLE, Step.JUDGE) and f"{iteration}/{Step.PAIR}" not in run.state["steps"]:
        folder = run.directory / "rollouts" / iteration
        rollouts = read_rollouts(folder / SAMPLES)
        if name == Step.JUDGE and run.state["steps"][step]:
            read_rewards(folder / REWARDS, rollouts)


def check_steps(run: Run) -> None:
    """Rewind to the first recorded step with a corrupt file, and note it."""
    for step in list(run.state["steps"]):
        try:
            _check(run, step)
        except (ValueError, FileNotFoundError) as error:
            run.rewind(step, str(error))
            return
