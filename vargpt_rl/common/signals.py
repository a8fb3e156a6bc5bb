"""Signals that stop a run, alike in every phase. No heavy imports, so that they are handled from the first second."""

import contextlib
import os
import signal
import sys
import weakref
from types import FrameType

STOPS = {
    signal.SIGTERM: os.EX_TEMPFAIL,
    signal.SIGHUP: os.EX_TEMPFAIL,
    signal.SIGUSR2: os.EX_TEMPFAIL,
    signal.SIGINT: 128 + signal.SIGINT,
}
"""Signals that stop a run, each with its exit code."""


class Stop:
    """The exit code of the signal that stops this process; None until one has come."""

    code: int | None = None
    resume = "the same command resumes"
    """What to say about resuming."""


RETRY_S = 0.05
"""Seconds until a signal is handled again that came while Python would have dropped the exception."""


def stop(number: int, frame: FrameType | None) -> None:
    """Signal handler: raise SystemExit, and ignore further signals. Raised inside a call of Ray, its status is lost.

    Python prints an exception in a finalizer or in a callback of a weak reference, and goes on: there the handler
    returns, and is called again a little later.
    """
    if _drops_exceptions(frame):
        signal.signal(signal.SIGALRM, lambda _, later: stop(number, later))
        signal.setitimer(signal.ITIMER_REAL, RETRY_S)
        return
    for each in STOPS:
        signal.signal(each, signal.SIG_IGN)
    Stop.code = STOPS[signal.Signals(number)]
    with contextlib.suppress(OSError):  # the terminal may be gone; a print may have been interrupted
        os.write(2, f"{signal.Signals(number).name}: stopping; {Stop.resume}\n".encode())
    sys.exit(Stop.code)


def _drops_exceptions(frame: FrameType | None) -> bool:
    """Tell whether Python is in a finalizer or in a callback of the module weakref."""
    while frame is not None:
        if frame.f_code.co_name == "__del__" or frame.f_code.co_filename == weakref.__file__:
            return True
        frame = frame.f_back
    return False


def handle_signals() -> None:
    """Handle the signals of ``STOPS`` with `stop`, except SIGHUP where it is ignored, as under nohup.

    SIGINT is handled even if it is ignored: shells do that to every background job of a script.
    """
    for each in STOPS:
        if Stop.code is None and not (each is signal.SIGHUP and signal.getsignal(each) is signal.SIG_IGN):
            signal.signal(each, stop)
