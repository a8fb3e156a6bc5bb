"""Ray on one node of a job, until SIGTERM: the task of ``loop.sbatch`` on every node.

``ray symmetric-run`` is not used: it refuses a node where another job runs Ray, and ends with ``ray stop``, which stops
the other job's processes too. Here every process is a descendant of this one and ends with it.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path

import psutil

from vargpt_rl.common.streams import make_outputs_lasting

PR_SET_CHILD_SUBREAPER = 36
SOCKET_PATH = 107
"""Bytes that Linux allows in a socket's path."""
SESSION = len("/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store.1")
"""Length of what Ray appends to the path of its folder."""
GRACE_S = 10.0


def scratch() -> Path:
    """A new private folder for the temporary files of Ray's processes. ValueError if its path is too long."""
    parent = tempfile.gettempdir()
    longest = SOCKET_PATH - SESSION - len("/ray12345678")
    if len(os.fsencode(parent)) > longest:
        raise ValueError(f"TMPDIR={parent}: expected a path of at most {longest} bytes: Ray's sockets lie below it")
    return Path(tempfile.mkdtemp(prefix="ray", dir=parent))


def memory_options(environ: Mapping[str, str]) -> list[str]:
    """Options for the job's memory limit on this node, if any, split as Ray does: Ray sees the whole machine's."""
    megabytes = int(environ.get("SLURM_MEM_PER_NODE", 0))
    megabytes = megabytes or int(environ.get("SLURM_MEM_PER_CPU", 0)) * int(environ["SLURM_CPUS_ON_NODE"])
    if not megabytes:
        return []
    store = min(0.3 * megabytes * 2**20, 0.9 * shutil.disk_usage("/dev/shm").free)
    return [f"--memory={int(megabytes * 2**20 - store)}", f"--object-store-memory={int(store)}"]


def command(environ: Mapping[str, str], folder: Path) -> list[str]:
    """The ``ray start`` command of this node. Ports that are not named are free ones."""
    name, (host, port) = environ["SLURMD_NODENAME"], environ["VARGPT_RL_HEAD"].rsplit(":", 1)
    options = [
        "--block",
        f"--temp-dir={folder}",
        f"--labels=slurm-node={name}",
        f"--num-cpus={environ['SLURM_CPUS_ON_NODE']}",
        *memory_options(environ),
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--dashboard-agent-listen-port=0",
        "--disable-usage-stats",
    ]
    if name == environ["VARGPT_RL_HEAD_NODE"]:
        options += ["--head", f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={int(port) + 1}"]
        options += [f"--ray-client-server-port={int(port) + 2}"]
        address = socket.gethostbyname(host)
        if not ip_address(address).is_loopback:  # a loopback name means this machine: Ray finds its address itself
            options.append(f"--node-ip-address={address}")
    else:
        options.append(f"--address={host}:{port}")
    return [sys.executable, "-m", "ray.scripts.scripts", "start", *options]


def wait_for(address: str, seconds: float) -> None:
    """Wait until something listens at ``address``. TimeoutError after ``seconds``."""
    host, port = address.rsplit(":", 1)
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, int(port)), 2).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise TimeoutError(f"Ray's head does not listen at {address} after {seconds:g} s: {error}") from error
            time.sleep(0.5)


def end_descendants() -> None:
    """Terminate all descendants, then kill those that are left."""
    for wait_s, end in ((GRACE_S, psutil.Process.terminate), (GRACE_S, psutil.Process.kill)):
        descendants = psutil.Process().children(recursive=True)
        for process in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
        psutil.wait_procs(descendants, wait_s)
    for process in psutil.Process().children(recursive=True):  # started meanwhile
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def main() -> int:
    """Run Ray; return 0 if it was told to stop, 1 if it ended by itself."""
    # Orphans are reparented to this process instead of init, so that it can end them.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    name, logs = os.environ["SLURMD_NODENAME"], Path(os.environ["VARGPT_RL_LOGS"])
    folder = None
    try:
        if name != os.environ["VARGPT_RL_HEAD_NODE"]:
            wait_for(os.environ["VARGPT_RL_HEAD"], float(os.environ["VARGPT_RL_READY_S"]))
        folder = scratch()
        environment = os.environ | {"TMPDIR": str(folder)}
        environment.pop("RAY_ADDRESS", None)
        status = subprocess.run(command(os.environ, folder), env=environment).returncode
        print(f"error: Ray on {name} ended with {status}", file=sys.stderr)
        return 1
    except (TimeoutError, ValueError, OSError) as error:
        print(f"error: {name}: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_descendants()
        if folder:
            for session in folder.glob("session_2*/logs"):
                shutil.copytree(session, logs / f"{name}-ray", dirs_exist_ok=True, ignore_dangling_symlinks=True)
            shutil.rmtree(folder)


if __name__ == "__main__":
    make_outputs_lasting()
    sys.exit(main())
