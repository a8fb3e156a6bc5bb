"""Ray's start on a node, and what a job waits for, without Slurm."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from slurm import drive, node
from vargpt_rl.common.signals import Stop

ROOT = Path(__file__).parents[2]
ENVIRON = {
    "SLURMD_NODENAME": "a",
    "SLURM_CPUS_ON_NODE": "8",
    "VARGPT_RL_HEAD": "10.0.0.1:20003",
    "VARGPT_RL_HEAD_NODE": "a",
}


def test_ray_start_on_head_and_other_nodes(tmp_path):
    head = node.command(ENVIRON, tmp_path)
    assert {"--head", "--port=20003", "--dashboard-host=127.0.0.1", "--dashboard-port=20004"} <= set(head)
    assert {"--ray-client-server-port=20005", "--node-ip-address=10.0.0.1", "--labels=slurm-node=a"} <= set(head)
    other = node.command(ENVIRON | {"SLURMD_NODENAME": "b"}, tmp_path)
    assert "--head" not in other and "--address=10.0.0.1:20003" in other and "--labels=slurm-node=b" in other
    for command in (head, other):
        assert {"--block", f"--temp-dir={tmp_path}", "--num-cpus=8", "--min-worker-port=0"} <= set(command)
        assert not any(option.startswith("--memory") for option in command)
    loopback = node.command(ENVIRON | {"VARGPT_RL_HEAD": "127.0.0.1:1"}, tmp_path)
    assert not any(option.startswith("--node-ip-address") for option in loopback)


@pytest.mark.parametrize(
    "limits", [{"SLURM_MEM_PER_NODE": "1000"}, {"SLURM_MEM_PER_NODE": "0", "SLURM_MEM_PER_CPU": "125"}]
)
def test_ray_gets_the_jobs_memory_not_the_machines(limits):
    memory, store = (int(option.split("=")[1]) for option in node.memory_options(ENVIRON | limits))
    assert memory + store == 1000 * 2**20
    assert 0 < store <= 300 * 2**20 and store < shutil.disk_usage("/dev/shm").free
    assert node.memory_options(ENVIRON) == []


def test_a_folder_too_deep_for_sockets_is_rejected(tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 40)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(ValueError, match=f"TMPDIR={deep}: expected a path of at most"):
        node.scratch()
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    folder = node.scratch()
    assert folder.stat().st_mode & 0o777 == 0o700
    with socket.socket(socket.AF_UNIX) as listening:  # the longest of Ray's
        inside = folder / "session_2026-01-01_00-00-00_000000_1234567/sockets"
        inside.mkdir(parents=True)
        listening.bind(str(inside / "plasma_store.1"))
    shutil.rmtree(folder)


def test_a_head_that_never_listens_is_named():
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
        node.wait_for(address, 1)
    with pytest.raises(TimeoutError, match=f"does not listen at {address} after 0.1 s"):
        node.wait_for(address, 0.1)


def test_what_nodes_lack_is_named():
    def seen(name, gpus=0.0, alive=True):
        return {"Alive": alive, "Labels": {"slurm-node": name}, "Resources": {"CPU": 2.0, "GPU": gpus}}

    nodes = [seen("a", 4.0), seen("b", 3.0), seen("c", 4.0, alive=False), {**seen("d", 4.0), "Labels": {}}]
    assert drive.missing(nodes, ["a", "b", "c", "d"], 4) == ["b has 3 of 4 GPUs", "c has no Ray", "d has no Ray"]
    assert drive.missing(nodes, ["a"], 4) == []


def test_progress_is_a_step_or_a_newer_checkpoint(tmp_path):
    assert drive.finished(tmp_path) == (set(), 0.0)
    (tmp_path / "state.json").write_text('{"steps": {"pretrain": {}}}')
    begun = drive.finished(tmp_path)
    assert begun == ({"pretrain"}, 0.0)
    (tmp_path / "checkpoints/sft/step").mkdir(parents=True)
    (tmp_path / "checkpoints/sft/step/weights.safetensors").touch()
    assert drive.finished(tmp_path) == begun
    (tmp_path / "checkpoints/sft/step/COMPLETE").touch()
    assert drive.finished(tmp_path) != begun


@pytest.mark.parametrize(("stopped_by", "code"), [(None, os.EX_TEMPFAIL), (os.EX_TEMPFAIL, 1)])
def test_only_a_stopped_job_is_told_of_its_time_limit(tmp_path, monkeypatch, capsys, stopped_by, code):
    """A run that waits for people's labels ends without a signal."""
    logs = tmp_path / "slurm/1"
    for name, value in {"LOGS": str(logs), "HEAD": "a:1", "NODES": "a", "GPUS": "0", "READY_S": "1"}.items():
        monkeypatch.setenv(f"VARGPT_RL_{name}", value)
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setattr(drive, "gather", lambda *_: None)
    monkeypatch.setattr(drive.signal, "signal", lambda *_: None)
    monkeypatch.setattr(drive.loop, "main", lambda _: os.EX_TEMPFAIL)
    monkeypatch.setattr(Stop, "code", stopped_by)
    assert drive.main() == code
    assert ("time limit" in capsys.readouterr().err) == (stopped_by is not None)


STUBBORN = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    time.sleep(300)
"""
PARENT = f"""
import ctypes, subprocess, sys, time
from slurm import node
node.GRACE_S = 0.5
ctypes.CDLL(None).prctl(node.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
subprocess.run([sys.executable, "-c", {STUBBORN!r}])
print("begun", flush=True)
node.end_descendants()
"""


def test_an_orphan_that_ignores_sigterm_is_killed():
    mark = {"VARGPT_RL_TEST": str(time.time())}
    environment = os.environ | mark | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PARENT], env=environment, capture_output=True, text=True, timeout=30)
    assert done.stdout == "begun\n" and done.returncode == 0, done.stderr

    def marked(process):
        try:
            return process.environ().items() >= mark.items()
        except psutil.Error:
            return False

    assert not [process for process in psutil.process_iter() if marked(process)]
