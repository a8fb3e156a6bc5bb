"""Atomic files and folders: readers see a whole version or none.

One durability rule holds everywhere: write under a temporary name beside the target, fsync the contents, rename, fsync
the parent folder. A crash therefore never leaves a truncated file under its final name.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vargpt_rl.common.failpoints import point


def sync(path: Path) -> None:
    """Flush a file's contents, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush a folder and everything below it to disk."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            sync(path)


def digest(path: Path) -> str:
    """Return the hexadecimal 16-byte blake2b hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def content_hash(content: bytes) -> str:
    """Return the hash of `digest` for bytes."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces ``path`` when the block succeeds and is removed otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        sync(temporary)
        point(f"{path.name}/written")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # free the space again if the disk filled up
    sync(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the contents of ``path`` by ``data``."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def atomic_dir(target: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; it replaces ``target`` when the block succeeds and is removed otherwise.

    The folder has a fixed name, so that the next attempt removes what a killed process left.
    """
    unfinished = target.with_name(f".{target.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        sync_tree(unfinished)
    except BaseException:
        shutil.rmtree(unfinished)  # free the space again if the disk filled up
        raise
    replace_dir(unfinished, target)


def replace_dir(unfinished: Path, target: Path) -> None:
    """Rename a folder whose contents are synced to ``target``. The old ``target`` is deleted after the rename."""
    name = f"{target.parent.name}/{target.name}"
    old = _aside(target)
    point(f"{name}/written")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    point(f"{name}/removed")
    os.replace(unfinished, target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
    point(f"{name}/there")


def restore_dir(target: Path) -> None:
    """Bring back the old ``target`` if a crash interrupted `replace_dir` between its two renames."""
    if _aside(target).exists() and not target.exists():
        os.replace(_aside(target), target)
        sync(target.parent)


def remove_dir(folder: Path) -> None:
    """Delete a folder such that no reader sees part of it."""
    aside = _aside(folder)
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    shutil.rmtree(aside)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def check_free_space(folder: Path, needed: int) -> None:
    """Raise OSError (ENOSPC) unless the disk that holds ``folder`` has ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"no room for a checkpoint, which needs {needed:,} bytes: the disk has {free:,}", str(folder)
        )
