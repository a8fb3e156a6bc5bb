"""Network addresses for process groups."""

import socket


def free_port() -> int:
    """Return a port that is currently free on this machine."""
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]
