"""Faults of a whole run: whatever dies, hangs or fills up, it ends in the preference tables and the summary of a run
that nothing happened to. Real processes, the smallest model, a deadline for each start.

``make test-faults`` runs all of them (some ten minutes); the rest of the tests has the quickest.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from tests.tiny import tiny_checkpoint
from vargpt_rl.failpoints import VARIABLE

ROOT = Path(__file__).parents[1]
SMALL = """
stages=[align] iterations=1 resolutions=[32] learner.ranks=2 learner.save_every=1 rollout.workers=1 rollout.batch_size=4
sft.records=8 sft.recipe.steps=3 sft.recipe.batch=4 sft.recipe.micro_batch=2
dpo.recipe.steps=3 dpo.recipe.batch=4 dpo.recipe.micro_batch=2
preference.count=8 evaluation.prompts=4 evaluation.questions=4 evaluation.grid=2 tracking.wandb=disabled
"""
IN_ITERATION = ("before", "sft", "after_sft", "pairs", "control", "dpo", "after_dpo", "grid")
STEPS = ["understands/before", *(f"iter-00/{step}" for step in IN_ITERATION), "understands/after"]
TIMES = ("seconds", "images_per_second")
"""What of a summary is not the same twice."""
DEADLINE_S = 600.0


class Ran:
    """One start of the loop: its exit code (negative: the signal), output, seconds, and faults that did not come."""

    def __init__(self, folder: Path, name: str, *overrides: str, **faults: str):
        points = folder / "faults" / name
        for point, fault in faults.items():
            (points / point).parent.mkdir(parents=True, exist_ok=True)
            (points / point).write_text(fault)
        log = folder / f"{name}.log"
        arguments = [f"runs={folder}", f"checkpoint={folder}/model", f"name={name}", *SMALL.split(), *overrides]
        environment = os.environ | {VARIABLE: str(points)}
        began = time.monotonic()
        with log.open("w") as output:
            driver = subprocess.Popen(
                [sys.executable, "-m", "vargpt_rl.loop", *arguments],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                self.code = driver.wait(DEADLINE_S)
            finally:
                self.seconds = time.monotonic() - began
                os.killpg(driver.pid, signal.SIGKILL) if driver.poll() is None else None
        self.said = log.read_text()
        self.left = [str(path.relative_to(points)) for path in points.rglob("*") if path.is_file()]


def outcome(directory: Path) -> tuple[dict[str, pd.DataFrame], dict]:
    """The preference tables and the summary, without times and without what went wrong."""

    def timeless(value):
        if isinstance(value, dict):
            return {key: timeless(each) for key, each in value.items() if key not in (*TIMES, "events", "restarts")}
        return [timeless(each) for each in value] if isinstance(value, list) else value

    tables = {path.name: pd.read_parquet(path) for path in sorted((directory / "preferences").glob("*.parquet"))}
    return tables, timeless(json.loads((directory / "summary.json").read_text()))


def same(directory: Path, undisturbed: Path) -> None:
    """Fails unless tables, summary and grids are those of the undisturbed run."""
    (tables, summary), (expected, reference) = outcome(directory), outcome(undisturbed)
    assert summary == reference
    assert tables.keys() == expected.keys() and len(tables) == 2
    for name, table in expected.items():
        pd.testing.assert_frame_equal(tables[name], table)
    for picture in (undisturbed / "samples").iterdir():
        assert (directory / "samples" / picture.name).read_bytes() == picture.read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    tiny_checkpoint(folder / "model")
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder) -> Path:
    ran = Ran(folder, "undisturbed")
    assert ran.code == 0, ran.said[-3000:]
    return folder / "undisturbed"


@pytest.mark.timeout(1800)
def test_the_driver_is_killed_at_every_step(folder, undisturbed):
    for step in STEPS:
        ran = Ran(folder, "driver", **{step: "kill"})
        assert (ran.code, ran.left) == (-signal.SIGKILL, []), (step, ran.said[-3000:])
    ran = Ran(folder, "driver")
    assert ran.code == 0, ran.said[-3000:]
    same(folder / "driver", undisturbed)
    events = json.loads((folder / "driver/summary.json").read_text())["events"]
    assert events == [f"going on after {step}" for step in STEPS[:-1]]
