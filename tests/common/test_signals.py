"""Signals end a program alike in every phase, and its outputs never do."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vargpt_rl.common.signals import STOPS

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from vargpt_rl.common.signals import Stop, handle_signals
from vargpt_rl.common.streams import make_outputs_lasting
make_outputs_lasting()
handle_signals()
print("ready", flush=True)
try:
    {work}
except SystemExit:
    sys.exit(Stop.code)
finally:
    print("saved", file=sys.stderr)
"""
PHASES = {
    "asleep": "import time; time.sleep(60)",
    "busy": "sum(i for i in iter(int, 1))",
    "printing": "[print('x' * 100, file=sys.stderr) for _ in iter(int, 1)]",
    "importing": "import torch, transformers, ray; import time; time.sleep(60)",
    "in a child": "import subprocess; subprocess.run(['sleep', '60'])",
}


def foreground() -> None:
    """Handle SIGHUP as a program in a terminal does, though the tests may run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def start():
    """Start programs, and kill those that are left."""
    processes = []

    def run(command: list[str], preexec_fn=foreground, **options) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "errors": "replace"}
        processes.append(subprocess.Popen(command, cwd=ROOT, preexec_fn=preexec_fn, **pipes, **options))  # noqa: PLW1509 (it sets a signal)
        return processes[-1]

    yield run
    for process in processes:
        process.kill()


@pytest.fixture
def started(start):
    """Start a program and wait until it handles signals."""

    def run(code: str, **options) -> subprocess.Popen:
        process = start([sys.executable, "-c", code], **options)
        assert process.stdout.readline() == "ready\n"
        return process

    return run


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("number", STOPS)
def test_every_phase_ends_in_time_with_one_line_and_the_code(number, phase, started):
    process = started(PROGRAM.format(work=PHASES[phase]), start_new_session=True)
    time.sleep(0.2)
    began = time.monotonic()
    os.killpg(process.pid, number)  # as a terminal does
    _, errors = process.communicate(timeout=30)
    assert process.returncode == STOPS[number] and time.monotonic() - began < 10
    assert errors.count(f"{number.name}: stopping; the same command resumes") == 1
    assert "Traceback" not in errors and errors.endswith("saved\n")


def test_nohup_is_respected_and_a_background_job_can_be_interrupted(started):
    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    process = started(PROGRAM.format(work=PHASES["asleep"]), preexec_fn=ignore)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130


@pytest.mark.parametrize("number", STOPS)
def test_the_loop_is_stopped_while_it_starts(number, tmp_path, start):
    process = start([sys.executable, "-m", "vargpt_rl.loop", f"runs={tmp_path}", "rollout.workers=64"])
    time.sleep(2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == STOPS[number] and "Traceback" not in errors


LINES = (
    "[print('schöne Bilder: 李', 'x' * 1000, file=stream) for _ in range(200) for stream in (sys.stdout, sys.stderr)]"
)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_closed_pipes_and_poor_terminals_end_nothing(encoding, tmp_path, started):
    mark = tmp_path / "done"
    code = PROGRAM.format(work=f"{LINES}; open({str(mark)!r}, 'w')")
    process = started(code, env=os.environ | {"PYTHONIOENCODING": encoding})
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=60) == 0 and mark.exists()
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True
    )
    assert ran.returncode == 0 and (b"?" in ran.stdout) == (encoding != "utf-8")
