"""Access to a Ray cluster: accepted clients, and the addresses on which its processes listen."""

import os
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

CLIENT = "import sys\nfrom ray._raylet import GcsClient\nprint(len(GcsClient(address=sys.argv[1]).get_all_node_info()))"


def nodes_shown(address: str, token: str | None, home: Path) -> int | None:
    """Return the number of nodes that a new client with this token sees, None if the cluster refuses it."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {"HOME": str(home)}
    if token:
        environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    command = [sys.executable, "-c", CLIENT, address]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    if done.returncode:
        assert "AuthenticationError" in done.stderr, done.stderr
        return None
    return int(done.stdout)


def listening(processes: Iterable[psutil.Process]) -> dict[int, set[str]]:
    """The addresses by port."""
    found: dict[int, set[str]] = {}
    for process in processes:
        with suppress(psutil.Error):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.setdefault(connection.laddr.port, set()).add(connection.laddr.ip.removeprefix("::ffff:"))
    return found
