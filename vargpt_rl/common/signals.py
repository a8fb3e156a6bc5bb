"""Signals that stop a run, alike in every phase. No heavy imports, so that they are handled from the first second."""

import atexit
import contextlib
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
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
    waited_s = 0.0
    """For how long it has been put off."""
    resume = "the same command resumes"
    """What to say about resuming."""


RETRY_S = 0.05
"""Seconds until a signal is handled again that came while Python would have dropped the exception."""
IMPORT_S = 4.0
"""Seconds that a signal waits for the end of an import, whose C++ code may abort at an exception."""
AGAIN_S = 0.5
"""Seconds until the exception is raised again that came in an import and that a library may have caught."""


def stop(number: int, frame: FrameType | None) -> None:
    """Signal handler: raise SystemExit, and ignore further signals. Raised inside a call of Ray, its status is lost.

    Python prints an exception in a finalizer or in a callback of a weak reference, and goes on: there the handler
    returns, and is called again a little later. So it does in imports, but for ``IMPORT_S`` at most. Libraries that try
    to import a module may catch all exceptions: what is raised in an import is raised again while nothing handles it.
    """
    importing = any(each.f_code.co_filename.startswith("<frozen importlib") for each in _callers(frame))
    if _drops_exceptions(frame) or (importing and Stop.waited_s < IMPORT_S):
        Stop.waited_s += RETRY_S
        signal.signal(signal.SIGALRM, lambda _, later: stop(number, later))
        signal.setitimer(signal.ITIMER_REAL, RETRY_S)
        return
    for each in STOPS:
        signal.signal(each, signal.SIG_IGN)
    Stop.code = STOPS[signal.Signals(number)]
    with contextlib.suppress(OSError):  # the terminal may be gone; a print may have been interrupted
        os.write(2, f"{signal.Signals(number).name}: stopping; {Stop.resume}\n".encode())
    if importing:
        signal.signal(signal.SIGALRM, _stop_again)
        signal.setitimer(signal.ITIMER_REAL, AGAIN_S, AGAIN_S)
        atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)  # runs before all that imports have registered
    sys.exit(Stop.code)


def _stop_again(number: int, frame: FrameType | None) -> None:
    """Signal handler: raise SystemExit again, unless it is on its way or the interpreter is ending."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, SystemExit):
        error = error.__context__
    ending = any(each.f_code is threading._shutdown.__code__ for each in _callers(frame))  # type: ignore[attr-defined]
    if error is None and not ending and not _drops_exceptions(frame):
        sys.exit(Stop.code)


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _drops_exceptions(frame: FrameType | None) -> bool:
    """Tell whether Python is in a finalizer or in a callback of the module weakref."""
    codes = [each.f_code for each in _callers(frame)]
    return any(code.co_name == "__del__" or code.co_filename == weakref.__file__ for code in codes)


def handle_signals() -> None:
    """Handle the signals of ``STOPS`` with `stop`, except SIGHUP where it is ignored, as under nohup.

    SIGINT is handled even if it is ignored: shells do that to every background job of a script.
    """
    for each in STOPS:
        if Stop.code is None and not (each is signal.SIGHUP and signal.getsignal(each) is signal.SIG_IGN):
            signal.signal(each, stop)
