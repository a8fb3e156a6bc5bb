"""Logging of the programs: messages of this project to stderr, INFO and above, and of a run to its ``run.log`` too."""

import logging
import sys
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

from vargpt_rl.common.bars import hide_library_bars

OURS = ("__main__", "vargpt_rl", "actors", "learners", "rewards")
"""Loggers of this project's packages; libraries keep their own settings."""

RECORD = logging.getLogger("vargpt_rl.record")
"""Logger of what a run's terminal shows by other means: it writes to ``run.log`` alone."""
RECORD.propagate = False
RUN_LOG = "run.log"


def configure_logging() -> None:
    """Send log messages to stderr: formatted by rich on a terminal, one plain line each elsewhere.

    Libraries show no progress bars from then on.
    """
    hide_library_bars()
    logging.getLogger("DeepSpeed").addFilter(_is_not_about_cpus)  # which saving a model imports
    if sys.stderr.isatty():
        handler: logging.Handler = RichHandler(console=Console(stderr=True), show_path=False)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in OURS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)


def _is_not_about_cpus(record: logging.LogRecord) -> bool:
    """Tell whether a message is another one than DeepSpeed's warning that it finds no GPU."""
    return not record.getMessage().startswith("Setting accelerator to CPU")


def keep_log(directory: Path) -> logging.Handler:
    """Write all messages to ``run.log`` in a directory as well, until the handler is given to `end_log`."""
    handler = logging.FileHandler(directory / RUN_LOG, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for logger in (*map(logging.getLogger, OURS), RECORD):
        logger.addHandler(handler)
    RECORD.setLevel(logging.INFO)
    return handler


def end_log(handler: logging.Handler) -> None:
    """Close a handler of `keep_log`."""
    for logger in (*map(logging.getLogger, OURS), RECORD):
        logger.removeHandler(handler)
    handler.close()
