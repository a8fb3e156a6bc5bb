"""Standard output and error that never end a program: nobody may read them, or only in ASCII."""

import contextlib
import errno
import io
import os
import select
import sys
from typing import TextIO

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that is full, which may have room later."""


class LastingOutput(io.RawIOBase):
    """Writes to a file descriptor until its reader is gone, and to nowhere from then on."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self.gone = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return not self.gone and os.isatty(self.descriptor)

    def write(self, data) -> int:  # type: ignore[no-untyped-def, override]  # any buffer
        while not self.gone:
            try:
                return os.write(self.descriptor, data)
            except BlockingIOError:  # another program has set a pipe or terminal that they share not to block
                select.select([], [self.descriptor], [])
            except OSError as error:
                self.gone = error.errno not in FULL  # a closed pipe or terminal
                break
        return len(data)


def lasting(stream: TextIO | None) -> TextIO:
    """Return a stream for the same descriptor; characters that its encoding lacks become question marks.

    None, a descriptor that was closed when the program started, becomes a stream to nowhere. A stream without a
    descriptor, such as that of a notebook, stays.
    """
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    with contextlib.suppress(OSError):  # the pipe may be closed already
        stream.flush()
    try:
        descriptor = stream.fileno()
    except io.UnsupportedOperation:
        return stream
    buffer = io.BufferedWriter(LastingOutput(descriptor))
    return io.TextIOWrapper(buffer, stream.encoding, errors="replace", line_buffering=True)


def make_outputs_lasting() -> None:
    """Replace ``sys.stdout`` and ``sys.stderr`` of this program.

    A descriptor of these that is closed is taken, so that no file gets it, into which others would print.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # has the lowest number that is free
    sys.stdout, sys.stderr = lasting(sys.stdout), lasting(sys.stderr)
