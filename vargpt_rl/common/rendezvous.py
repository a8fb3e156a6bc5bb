"""The rendezvous of a process group, which listens on one address alone."""

import socket
from datetime import timedelta

import torch.distributed as dist


def rendezvous(host: str, port: int, rank: int, world: int, timeout: timedelta) -> dist.TCPStore:
    """Return the store of a process group, which rank 0 holds at ``host:port``.

    By default torch listens on every interface; whoever reaches the port can read and change the store, or end it. The
    socket that rank 0 hands to torch is bound to ``host``, an address of its machine. OSError if it is not.
    """
    if rank != 0:
        return dist.TCPStore(host, port, world, is_master=False, timeout=timeout)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=max(world, 128))
    return dist.TCPStore(
        host,
        listening.getsockname()[1],
        world,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,  # otherwise a rank 0 that is told of a used port waits for nobody
        master_listen_fd=listening.detach(),  # torch closes it
    )
