"""Standard output and error that never end a program: nobody may read them, or only in ASCII."""

import io
import os
import sys
from typing import TextIO


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
        if not self.gone:
            try:
                return os.write(self.descriptor, data)
            except OSError:  # a closed pipe or terminal
                self.gone = True
        return len(data)


def lasting(stream: TextIO) -> TextIO:
    """Return a stream for the same descriptor; characters that its encoding lacks become question marks."""
    buffer = io.BufferedWriter(LastingOutput(stream.fileno()))
    return io.TextIOWrapper(buffer, stream.encoding, errors="replace", line_buffering=True)


def make_outputs_lasting() -> None:
    """Replace ``sys.stdout`` and ``sys.stderr`` of this program."""
    sys.stdout.flush()
    sys.stdout, sys.stderr = lasting(sys.stdout), lasting(sys.stderr)
