"""Fail points: places where a test can make a process die, hang or find the disk full.

Off unless ``VARGPT_FAILPOINTS`` names a folder. A file in it, named after a fail point, holds the fault for the first
process that gets there: ``kill`` (SIGKILL), ``hang`` (forever) or ``full`` (OSError ENOSPC). The file is deleted as the
fault happens, so each fault happens once, and a file that is left tells a test that its fault did not happen.
"""

import errno
import os
import signal
import time
from pathlib import Path

VARIABLE = "VARGPT_FAILPOINTS"


def point(name: str) -> None:
    """Mark a fail point. Slashes in ``name`` stand for sub-folders."""
    if VARIABLE not in os.environ:
        return
    file = Path(os.environ[VARIABLE]) / name
    try:
        fault = file.read_text()
        file.unlink()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):  # not requested, or another process was first
        return
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hang":
        time.sleep(10**9)
    if fault == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    raise ValueError(f"{file}: expected kill, hang or full, got {fault!r}")
