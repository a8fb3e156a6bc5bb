"""Fail points: nothing unless asked for, and then once."""

import errno
import os
import signal

import pytest

from tests.helpers.faults import ask
from vargpt_rl.common.failpoints import VARIABLE, point


def test_nothing_happens_unasked(tmp_path, monkeypatch):
    (tmp_path / "here").write_text("kill")
    monkeypatch.delenv(VARIABLE, raising=False)
    point("here")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    point("elsewhere")
    assert (tmp_path / "here").exists()


def test_a_process_is_killed_once(tmp_path, monkeypatch):
    ask(tmp_path, "stage/step-2")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    ended = []
    for _ in range(2):
        if (child := os.fork()) == 0:
            point("stage/step-2")
            os._exit(0)
        ended.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert ended == [-signal.SIGKILL, 0]


def test_a_full_disk_and_a_fault_that_does_not_exist(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    (tmp_path / "table").write_text("full")
    with pytest.raises(OSError) as raised:
        point("table")
    assert raised.value.errno == errno.ENOSPC
    (tmp_path / "table").write_text("kil")
    with pytest.raises(ValueError, match="table: expected kill, hang or full, got 'kil'"):
        point("table")
