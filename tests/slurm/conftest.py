"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd, in a folder and on ports of their own.

They run as the user of the tests, who need not be root. They are stopped at the end, and die with this process.
Timeouts are for a busy machine.
"""

import ctypes
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
NODES = ("node1", "node2")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,sched_min_interval=100000,batch_sched_delay=0
MpiDefault=none
ReturnToService=1
KillWait=120
UnkillableStepTimeout=300
MessageTimeout=60
BatchStartTimeout=120
MinJobAge=3600
GresTypes=gpu
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:1
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 Gres=gpu:1
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP OverSubscribe=NO
"""
GRES = "NodeName=node[1-2] Name=gpu File=/dev/null\n"  # counted by Slurm, and no GPU to anyone else


def wait_for(condition: Callable[[], object], seconds: float, what: Callable[[], str] = lambda: "") -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not in {seconds} s. {what()}"
        time.sleep(0.2)


def with_parent() -> None:
    """In a new process: end when the one that started it does."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


class Slurm:
    """The running cluster, and what its users' commands say."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environ = os.environ | {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self.environ = {key: value for key, value in self.environ.items() if not key.startswith("RAY_")}

    def __call__(self, *command: str, **options) -> str:
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=900, **options)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Return Slurm's fields of a job by name."""
        return dict(word.split("=", 1) for word in self("scontrol", "-o", "show", "job", number).split() if "=" in word)

    def processes(self, number: str | None = None) -> list[psutil.Process]:
        """Those of a job of this cluster, or of all, found by their environment: also those that have left its process
        tree.
        """
        found = []
        for process in psutil.process_iter():
            try:
                environ = process.environ()
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
            job = environ.get("SLURM_JOB_ID")
            if environ.get("SLURM_CONF") == self.environ["SLURM_CONF"] and job and number in (None, job):
                found.append(process)
        return found


@pytest.fixture(scope="session")
def slurm():
    if "TEST_SLURM" not in os.environ:
        pytest.skip("jobs on a real Slurm take minutes: make test-slurm runs them")
    lacking = [program for program in PROGRAMS if not shutil.which(program, path=PATH)]
    if lacking:
        pytest.skip(f"Slurm is not installed (no {', '.join(lacking)}): the packages are slurm-wlm and munge")
    # Not pytest's folder: its parents are closed to others, which munged does not allow.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o711)
    cluster, daemons = Slurm(folder), []
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [listening.getsockname()[1] for listening in sockets]
    for listening in sockets:
        listening.close()
    settings = {"folder": folder, "user": getpass.getuser(), "host": socket.gethostname().split(".")[0], "ports": ports}
    (folder / "slurm.conf").write_text(CONF.format(**settings))
    (folder / "gres.conf").write_text(GRES)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(128))

    def start(*command: str) -> None:
        with (folder / "daemons.log").open("a") as log:
            options = {"env": cluster.environ, "stdout": log, "stderr": log, "preexec_fn": with_parent}
            daemons.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, **options))

    def said() -> str:
        return "\n".join(f"{path}:\n{path.read_text(errors='replace')[-1500:]}" for path in folder.glob("*.log"))

    try:
        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        named = [f"--{option}={folder}/munge.{suffix}" for option, suffix in files.items()]
        start("munged", "--foreground", f"--key-file={key}", *named)
        wait_for((folder / "munge.socket").exists, 60, said)
        start("slurmctld", "-D", "-i")
        for name in NODES:
            (folder / name).mkdir()
            start("slurmd", "-D", "-N", name)
        state = ("scontrol", "-o", "show", "nodes")
        wait_for(lambda: cluster(*state).count("State=IDLE ") == len(NODES), 180, said)
        yield cluster
        cluster("scancel", "--user", getpass.getuser())  # what a failed test has left
        wait_for(lambda: not cluster.processes(), 120, lambda: f"left: {cluster.processes()}")
    finally:
        for process in cluster.processes():
            process.kill()
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(folder)
