"""Tables on a terminal of any width."""

import textwrap

from rich.console import Console
from rich.table import Table
from rich.text import Text

NAMING = {"#": "iteration {}", "px": "{} px", "policy": "{}", "stage": "{}", "method": "{}"}
"""Columns that say what a row is of, and how to say so in a line."""


def wide_console(width: int = 120) -> Console:
    """Return a console as wide as the terminal; elsewhere one of at least ``width`` columns."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, width)
    return console


def fitted(table: Table, width: int) -> Table | Text:
    """Return the table; its rows as lines below each other where it is wider than ``width``."""
    if Console(width=1000).measure(table).maximum <= width:
        return table
    lines = [str(table.title)] if table.title else []
    for row in zip(*(column.cells for column in table.columns), strict=True):
        cells = [(str(column.header), str(cell)) for column, cell in zip(table.columns, row, strict=True)]
        if named := [NAMING[name].format(cell) for name, cell in cells if name in NAMING]:
            lines.append(", ".join(named))
        values = "; ".join(f"{name} {cell}" for name, cell in cells if name not in NAMING and cell != "-")
        lines += textwrap.wrap(values, width, initial_indent="  ", subsequent_indent="  ")
    return Text("\n".join(lines) + "\n")


def print_table(table: Table, console: Console | None = None) -> None:
    """Print a table, or its rows as lines where the terminal is too narrow for it."""
    console = console or wide_console()
    console.print(fitted(table, console.width))
