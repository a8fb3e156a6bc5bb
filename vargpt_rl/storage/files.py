"""Files that are written whole or not at all."""

import errno
import hashlib
import os
import shutil
from pathlib import Path

from vargpt_rl.common.failpoints import point


def sync(path: Path) -> None:
    """Have a file's contents, or a folder's entries, written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    """Hexadecimal blake2b of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` at once: never seen half written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        point(f"{path.name}/written")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # where the disk is full, it is not to stay so
    sync(path.parent)


def check_room(folder: Path, needed: int) -> None:
    """OSError (ENOSPC) that says so unless the disk of ``folder``, which exists, has room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"no room for a checkpoint, which needs {needed:,} bytes: the disk has {free:,}", str(folder)
        )
