"""Progress bars: those of this project's commands, and none of the libraries' own."""

import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

HIDDEN = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
"""Environment in which Hugging Face's libraries, transformers among them, show no bars. They read it when imported."""
LINE_EVERY_S = 30.0
"""Seconds between two lines about the progress without a terminal."""
LINE = "{desc}: {n_fmt}/{total_fmt}, {elapsed} elapsed, {remaining} left"


def hide_library_bars() -> None:
    """Switch off the bars of Hugging Face's libraries, here and in the processes that this one starts."""
    os.environ.update(HIDDEN)
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.disable_progress_bar()  # and the hub's
    if "datasets" in sys.modules:
        from datasets import disable_progress_bars

        disable_progress_bars()


class LineOutput:
    """File for a bar that writes each of its states as a line of its own."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        if told := text.strip():
            self.stream.write(f"{told}\n")

    def flush(self) -> None:
        self.stream.flush()


def progress_bar(items: Iterable | None = None, *, name: str, total: int | None = None, **options: Any) -> tqdm:
    """Return a bar for stderr: on a terminal drawn by tqdm, elsewhere a line every ``LINE_EVERY_S``.

    ``options`` are tqdm's.
    """
    shown = {"desc": name, "total": total} | options
    if not sys.stderr.isatty():
        shown |= {"file": LineOutput(sys.stderr), "bar_format": LINE}
        shown |= {"mininterval": LINE_EVERY_S, "maxinterval": LINE_EVERY_S, "delay": LINE_EVERY_S, "leave": False}
    return tqdm(items, **shown)
