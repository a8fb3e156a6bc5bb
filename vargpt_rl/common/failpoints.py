"""Points at which a test makes a process die, hang or find the disk full; off unless ``VARGPT_FAILPOINTS`` is set.

The variable names a folder. A file in it with the name of a point holds what happens to the process that comes there
first: ``kill`` (SIGKILL), ``hang`` (for good) or ``full`` (OSError ENOSPC). The file goes as it happens, so each
happens once, and what is left tells a test that a fault did not come about.
"""

import errno
import os
import signal
import time
from pathlib import Path

VARIABLE = "VARGPT_FAILPOINTS"


def point(name: str) -> None:
    """A place in the code where a fault may be asked for. ``name`` may have slashes, and is then in sub-folders."""
    if VARIABLE not in os.environ:
        return
    file = Path(os.environ[VARIABLE]) / name
    try:
        fault = file.read_text()
        file.unlink()
    except FileNotFoundError:  # not asked for, or another process was here first
        return
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hang":
        time.sleep(10**9)
    if fault == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    raise ValueError(f"{file}: {fault!r}, expected kill, hang or full")
