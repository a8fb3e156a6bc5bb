"""Consoles for tables."""

import os

from rich.console import Console


def wide_console(width: int = 120) -> Console:
    """Return a console as wide as the terminal or as COLUMNS says; elsewhere ``width`` columns."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = max(console.width, width)
    return console
