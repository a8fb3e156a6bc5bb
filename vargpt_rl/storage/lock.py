"""A lock on a folder: one process at a time writes to it.

The kernel holds it (``flock``) and releases it at any end of the process, SIGKILL included. Linux passes it to the
server of an NFS mount, so that it also holds between machines. A mount with ``nolock`` or ``local_lock`` holds it on
one machine only, and some file systems have none: a warning says so.
"""

import json
import logging
import os
import socket
import time
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from vargpt_rl.storage.files import write_atomically

logger = logging.getLogger(__name__)

LOCK, HOLDER = ".lock", ".lock.json"


def lock_folder(folder: Path) -> FileLock:
    """Lock a folder, which is made if need be, until the process ends or the lock is released or deleted.

    Raises ValueError, naming host and process, if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if is_local_only(folder):
        logger.warning("%s: its NFS mount keeps locks on this machine, so a start on another is not noticed", folder)
    lock = FileLock(folder / LOCK, fallback_to_soft=False, preserve_lock_file=True)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"{folder} is in use by {_holder(folder)}: wait for its end or stop it, or give this run another name=..."
        ) from None
    except (NotImplementedError, OSError) as error:
        logger.warning("%s cannot be locked (%s), so a second start is not noticed", folder, error)
        return lock
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    write_atomically(folder / HOLDER, json.dumps(holder).encode())
    return lock


def _holder(folder: Path) -> str:
    try:
        found = json.loads((folder / HOLDER).read_text())
        return f"process {found['pid']} on {found['host']} (since {found['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # it is about to be written
        return "another process"


def is_local_only(folder: Path) -> bool:
    """Tell whether a folder is on an NFS mount whose locks other machines do not see."""
    mounts = [mount for mount in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(mount.mountpoint)]
    nearest = max(mounts, key=lambda mount: len(mount.mountpoint), default=None)
    if nearest is None or nearest.fstype not in ("nfs", "nfs4"):
        return False
    return bool({"nolock", "local_lock=all", "local_lock=flock"} & set(nearest.opts.split(",")))
