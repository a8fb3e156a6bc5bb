"""Where processes of a group meet."""

import socket


def free_address() -> tuple[str, int]:
    """This host and a port that is free now."""
    with socket.socket() as free:
        free.bind(("", 0))
        return socket.gethostbyname(socket.gethostname()), free.getsockname()[1]
