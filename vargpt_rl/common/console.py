"""Consoles for tables."""

from rich.console import Console


def wide_console(width: int = 120) -> Console:
    """Return a console as wide as the terminal, in which tables fold their cells; elsewhere ``width`` columns."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, width)
    return console
