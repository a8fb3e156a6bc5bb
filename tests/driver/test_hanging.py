"""A signal ends a run within seconds while something in it hangs, and leaves no process."""

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.driver.test_faults import Ran
from tests.helpers.tiny import tiny_checkpoint

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]


@dataclass
class Hanging:
    """Stop a process whose title begins with ``title``, once there is ``file``; then send ``signal`` to the driver."""

    title: str
    signal: signal.Signals
    code: int
    limit_s: float = 10.0
    file: str = ""
    stops: bool = True


CASES = {
    "a rank in training": Hanging(
        "ray::RankHost", signal.SIGTERM, os.EX_TEMPFAIL, limit_s=25.0, file="checkpoints/iter-00-sft/log.jsonl"
    ),
    "a worker that generates": Hanging("ray::Worker.generate_images", signal.SIGHUP, os.EX_TEMPFAIL),
    "a worker that starts": Hanging("ray::Worker", signal.SIGINT, 130),
    "a reward that never answers": Hanging("ray::RewardProcess.score", signal.SIGINT, 130, stops=False),
}
"""What hangs. The first may take longer: it counts as hanging after three of its steps and at least ten seconds."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hanging")
    tiny_checkpoint(folder / "model")
    (folder / "never.py").write_text("import time\n\n\ndef never(images, prompts):\n    time.sleep(10**6)\n")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_signal_ends_a_run_in_which_something_hangs(folder, name):
    case = CASES[name]
    run = name.replace(" ", "-")
    told: list[float] = []

    def stop_and_signal(driver: psutil.Process) -> bool:
        file = folder / run / case.file
        if case.file and not (file.exists() and file.stat().st_size):
            return False
        with suppress(psutil.NoSuchProcess):
            for child in driver.children(recursive=True):
                if (" ".join(child.cmdline())).startswith(case.title):
                    if case.stops:
                        child.send_signal(signal.SIGSTOP)
                    time.sleep(1)
                    told.append(time.monotonic())
                    driver.send_signal(case.signal)
                    return True
        return False

    settings = ["sft.recipe.steps=200", "learner.save_every=100"] if case.file else []
    reward = [] if case.stops else [f"reward.path={folder}/never.py:never"]
    ran = Ran(folder, run, *settings, *reward, disturb=stop_and_signal)
    assert ran.code == case.code, ran.said[-3000:]
    assert f"to resume: vargpt-rl resume {folder / run}" in ran.said
    assert ran.orphans == []
    assert ran.ended - told[0] < case.limit_s
