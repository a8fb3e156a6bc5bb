"""Logging of the programs: messages of this project to stderr, INFO and above."""

import logging
import sys

from rich.console import Console
from rich.logging import RichHandler

OURS = ("__main__", "vargpt_rl", "actors", "learners", "rewards")
"""Loggers of this project's packages; libraries keep their own settings."""


def configure_logging() -> None:
    """Send log messages to stderr: formatted by rich on a terminal, one plain line each elsewhere."""
    if sys.stderr.isatty():
        handler: logging.Handler = RichHandler(console=Console(stderr=True), show_path=False)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in OURS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
