"""Consoles for tables."""

from rich.console import Console


def wide_console(width: int = 120) -> Console:
    """Return a console at least ``width`` columns wide: tables wrap on a narrower terminal but keep their columns."""
    console = Console()
    console.width = max(console.width, width)
    return console
