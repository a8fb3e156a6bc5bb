"""Where processes of a group meet."""

import socket


def free_port() -> int:
    """A port of this machine that is free now."""
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]
