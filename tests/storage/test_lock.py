"""Locks on folders: the second process is refused by the first's name, and any end releases them."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple

import filelock
import psutil
import pytest

from vargpt_rl.storage.lock import HOLDER, is_local_only, lock_folder

HOLD = "import sys, time; from pathlib import Path; from vargpt_rl.storage.lock import lock_folder\n"
HOLD += "lock = lock_folder(Path(sys.argv[1])); print('locked', flush=True); {}"


def holding(folder, then="time.sleep(600)"):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(then), str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    return process


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_lock_names_its_holder_and_ends_with_it(tmp_path, end):
    folder = tmp_path / "a run"
    holder = holding(folder)
    with pytest.raises(ValueError, match=f"in use by process {holder.pid} on {socket.gethostname()} ") as error:
        lock_folder(folder)
    assert str(folder) in str(error.value)
    holder.send_signal(end)
    holder.wait()
    lock = lock_folder(folder)
    assert f'"pid": {os.getpid()}' in (folder / HOLDER).read_text()
    lock.release()
    lock_folder(folder).release()


def test_a_child_that_outlives_the_holder_does_not_keep_the_lock(tmp_path):
    holder = holding(tmp_path, "import subprocess; subprocess.Popen(['sleep', '20']); time.sleep(600)")
    time.sleep(1)  # a child has the lock from fork to exec
    holder.kill()
    holder.wait()
    lock_folder(tmp_path).release()


def _try(folder, results):
    try:
        lock = lock_folder(folder)
    except ValueError:
        results.put(0)
    else:
        results.put(1)
        signal.pause()
        lock.release()


def test_one_of_many_gets_the_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_try, args=(tmp_path, results)) for _ in range(8)]
    for process in processes:
        process.start()
    assert sum(results.get(timeout=60) for _ in processes) == 1
    for process in processes:
        process.kill()
        process.join()


@pytest.mark.parametrize("content", ["", "[]", "{}", "{"])
def test_an_unreadable_holder_is_another_process(tmp_path, content):
    lock = lock_folder(tmp_path)
    (tmp_path / HOLDER).write_text(content)
    with pytest.raises(ValueError, match="in use by another process"):
        lock_folder(tmp_path)
    lock.release()


def test_file_systems_without_locks_are_told(tmp_path, monkeypatch, caplog):
    def acquire(lock, **options):
        raise NotImplementedError("no flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    lock_folder(tmp_path)
    assert f"{tmp_path} cannot be locked (no flock)" in caplog.text


Mount = namedtuple("Mount", "mountpoint fstype opts")


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("nfs4", "rw,hard", False),
        ("nfs", "rw,nolock,hard", True),
        ("nfs", "rw,local_lock=all", True),
        ("nfs4", "local_lock=none", False),
        ("ext4", "rw,nolock", False),
    ],
)
def test_nfs_that_keeps_locks_to_itself_is_known(tmp_path, monkeypatch, kind, options, expected):
    mounts = [Mount("/", "ext4", "rw"), Mount(str(tmp_path), kind, options)]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    assert is_local_only(tmp_path / "runs") == expected
