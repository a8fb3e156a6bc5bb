import pytest
from rich.console import Console
from rich.table import Table

from vargpt_rl.common.console import fitted, print_table


def table_of(columns: int) -> Table:
    table = Table(title="numbers", title_justify="left")
    for column in ("px", *(f"column{number}" for number in range(columns))):
        table.add_column(column, no_wrap=True)
    for px in (128, 256):
        table.add_row(str(px), *(f"{px}.{number}" for number in range(columns)))
    return table


def printed(table: Table, width: int) -> str:
    console = Console(width=width)
    with console.capture() as caught:
        print_table(table, console)
    return caught.get()


@pytest.mark.parametrize("columns", [3, 8, 20])
@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_cell_is_abbreviated_at_any_width(columns, width):
    text = printed(table_of(columns), width)
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    assert all(f"{px}.{number}" in text for px in (128, 256) for number in range(columns))


def test_a_table_stays_one_where_there_is_room():
    table = table_of(3)
    assert fitted(table, 80) is table
    assert str(fitted(table, 30)).splitlines()[:2] == ["numbers", "128 px"]


def test_rows_without_a_naming_column_are_indented_lines():
    table = Table("workers", "measured seconds")
    table.add_row("4", "1.5")
    assert str(fitted(table, 20)).splitlines() == ["  workers 4;", "  measured seconds", "  1.5"]
