"""Signals end a program alike in every phase, and its outputs never do."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vargpt_rl.common.signals import STOPS
from vargpt_rl.common.streams import LastingOutput

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
DELETING = """
    import time
    class Thing:
        def __del__(self):
            time.sleep(0.3)  # an exception in here would be printed and forgotten
    while True:
        Thing()
        time.sleep(0.2)
"""
CALLED_BACK = """
    import time, weakref
    class Thing:
        pass
    thing = Thing()
    weakref.finalize(thing, time.sleep, 0.5)
    del thing
    time.sleep(60)
"""
TRIED = """
    import pathlib, sys, tempfile, time
    folder = tempfile.mkdtemp()
    pathlib.Path(folder, "tried.py").write_text("import time; time.sleep(60)")
    sys.path.append(folder)
    for _ in range(2):
        try:
            import tried
        except BaseException:
            pass  # as libraries do with modules that they do not need
    try:
        time.sleep(60)
    finally:
        try:
            time.sleep(1.2)
        except SystemExit as again:
            raise RuntimeError("what is saved at the end was interrupted") from again
"""
PHASES = {
    "asleep": "import time; time.sleep(60)",
    "busy": "sum(i for i in iter(int, 1))",
    "printing": "[print('x' * 100, file=sys.stderr) for _ in iter(int, 1)]",
    "importing": "import torch, transformers, ray; import time; time.sleep(60)",
    "in a finalizer": DELETING.strip(),
    "in a callback of a weak reference": CALLED_BACK.strip(),
    "in an import that is tried": TRIED.strip(),
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


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (1, 2), (0, 1, 2)])
def test_descriptors_that_are_closed_at_the_start_take_no_file(closed, tmp_path):
    """As after ``program >&- 2>&-``: the next file that is opened would have their number."""
    code = f"""
import sys
from vargpt_rl.common.streams import make_outputs_lasting
make_outputs_lasting()
with open({str(tmp_path / "file")!r}, "w") as file:
    {LINES}
    file.write("content")
"""
    script = tmp_path / "program.py"
    script.write_text(code)
    closing = " ".join(f"{descriptor}>&-" for descriptor in closed)
    command = ["bash", "-c", f'exec "$0" "$1" {closing}', sys.executable, str(script)]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert ran.returncode == 0 and (tmp_path / "file").read_text() == "content"
    assert b"Traceback" not in ran.stderr


def test_a_pipe_that_does_not_block_loses_nothing(started):
    lines = LINES.replace("(sys.stdout, sys.stderr)", "(sys.stderr,)")
    process = started(PROGRAM.format(work=f"import os; os.set_blocking(2, False); {lines}"))
    time.sleep(0.5)  # until the pipe is full
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and errors.count("x" * 1000) == 200


def test_a_full_disk_ends_no_output_for_good():
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    output = LastingOutput(os.open("/dev/full", os.O_WRONLY))
    assert output.write(b"lost") == 4 and not output.gone
    os.close(output.descriptor)
    assert output.write(b"lost") == 4 and output.gone


LASTING = re.compile(
    r"make_outputs_lasting\(\)|return run_(command|program)\(.*arguments\)|sys.exit\(run_command|app import main$",
    re.MULTILINE,
)


@pytest.mark.parametrize(
    "file",
    [
        file.relative_to(ROOT).as_posix()
        for package in ("vargpt_rl", "actors", "learners", "rewards", "slurm")
        for file in sorted((ROOT / package).rglob("*.py"))
        if '\nif __name__ == "__main__":\n' in file.read_text()
    ],
)
def test_every_program_has_outputs_that_last(file):
    """The shared ways to run a program see to it, and so must each program that goes its own way."""
    text = (ROOT / file).read_text()
    assert LASTING.search(text)


@pytest.mark.parametrize("module", ["vargpt_rl.data.prompts", "vargpt_rl.page"])
def test_help_into_a_closed_pipe_is_no_error(module, start):
    process = start([sys.executable, "-m", module, "--help"])
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and not errors
