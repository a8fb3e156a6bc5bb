"""Progress bars with and without a terminal."""

import io
import os
import subprocess
import sys

import pytest
from transformers.utils import logging as of_transformers

from vargpt_rl.common import bars
from vargpt_rl.common.bars import HIDDEN, hide_library_bars, progress_bar

LIBRARIES = """
{before}
from vargpt_rl.common.logs import configure_logging
configure_logging()
import datasets
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils.logging import is_progress_bar_enabled
print(is_progress_bar_enabled(), are_progress_bars_disabled(), datasets.are_progress_bars_disabled())
"""


@pytest.mark.parametrize("before", ["", "import datasets, transformers.utils.logging"])
def test_commands_hide_the_bars_of_libraries_before_and_after_import(before):
    environment = {name: value for name, value in os.environ.items() if name not in HIDDEN}
    command = [sys.executable, "-c", LIBRARIES.format(before=before)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True", "True"], done.stderr


def test_processes_that_are_started_inherit_it(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    hide_library_bars()
    assert {name: os.environ[name] for name in HIDDEN} == HIDDEN
    assert not of_transformers.is_progress_bar_enabled()


def test_short_work_says_nothing_without_a_terminal(capsys):
    assert list(progress_bar(range(3), name="images")) == [0, 1, 2]
    assert not capsys.readouterr().err


def test_long_work_is_told_of_in_lines_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(bars, "LINE_EVERY_S", 0.0)
    with progress_bar(name="images", total=2) as bar:
        bar.update()
    lines = capsys.readouterr().err.split("\n")
    assert lines[-1] == "" and all(line.startswith("images: ") and "\r" not in line for line in lines[:-1])
    assert any(line.startswith("images: 1/2, 00:00 elapsed") for line in lines)


def test_a_terminal_has_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    list(progress_bar(range(2), name="images"))
    assert "100%" in terminal.getvalue()
