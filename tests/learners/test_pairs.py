"""The order of pairs: every one as often as any other, and the same whoever was faster."""

import json
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learners.pairs import PairOrder, PairTable
from tests.helpers.preferences import row
from vargpt_rl.data.preferences import join_parts, part_path, write_table

ORIGIN = {"samples": 4, "prompts": 4, "prompts_without_winner": 1, "dropped_by_reason": {"no winner": 1}}


def known(sizes: list[int]) -> SimpleNamespace:
    """A table of which all parts are there."""

    def first(parts: int) -> list[int]:
        while not any(sizes[:parts]):
            parts += 1
        return sizes[:parts]

    return SimpleNamespace(parts=len(sizes), sizes=sizes, first=first)


def write_part(table: Path, number: int, ids: str) -> Path:
    path = part_path(table, number)
    path.parent.mkdir(exist_ok=True)
    write_table(path, [row(name) for name in ids], ORIGIN)
    return path


def batches(order: PairOrder) -> list[list[int]]:
    rows = list(order)
    assert len(rows) == len(order)
    return [rows[at : at + order.batch] for at in range(0, len(rows), order.batch)]


@settings(max_examples=50)
@given(
    st.integers(1, 9), st.integers(1, 6), st.integers(0, 8), st.integers(1, 30), st.integers(1, 9), st.integers(0, 9)
)
def test_pairs_are_used_equally_often(size, parts, last, steps, batch, seed):
    sizes = [size] * parts + [min(last, size)]
    uses = Counter(PairOrder(known(sizes), steps, batch, seed))
    often = [uses[i] for i in range(sum(sizes))]
    assert max(often) - min(often) <= 1


@settings(max_examples=50)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any), st.integers(1, 20), st.integers(1, 5))
def test_no_more_steps_are_taken_than_there_is_of_the_table(sizes, steps, batch):
    order = PairOrder(known(sizes), steps, batch, 0)
    for step, rows in enumerate(batches(order), 1):
        parts = -(-step * len(sizes) // steps)
        assert max(rows) < max(sum(sizes[:parts]), next(size for size in sizes if size))
    assert list(order) == list(order), "it can begin again, as a resumed run does"


@settings(max_examples=50)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any), st.integers(1, 20), st.integers(1, 5))
def test_the_least_used_pair_comes_next(sizes, steps, batch):
    """Compare with the definition: of the pairs that have arrived, the least used; new ones in the table's order."""
    uses = Counter()
    for step, rows in enumerate(batches(PairOrder(known(sizes), steps, batch, 0)), 1):
        arrived = known(sizes).first(-(-step * len(sizes) // steps))
        for pair in rows:
            least = min(uses[i] for i in range(sum(arrived)))
            assert uses[pair] == least
            assert least or pair == min(i for i in range(sum(arrived)) if not uses[i])
            uses[pair] += 1


def test_the_order_of_a_seed_is_pinned():
    rows = list(PairOrder(known([3, 0, 4]), 7, 3, 5))
    assert rows == [0, 1, 2, 2, 0, 1, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 3, 4, 6, 5, 6]


def test_the_first_epoch_keeps_the_tables_order():
    rows = list(PairOrder(known([12]), 10, 4, 3))
    assert rows[:12] == list(range(12))
    later = rows[12:24], rows[24:36]
    assert all(sorted(epoch) == list(range(12)) for epoch in later) and later[0] != later[1] != rows[:12]


def test_late_parts_change_nothing(tmp_path, monkeypatch):
    late, whole = tmp_path / "late.parquet", tmp_path / "whole.parquet"
    texts = ["abcd", "", "efg"]
    parts = [write_part(whole, number, ids) for number, ids in enumerate(texts)]
    origin = join_parts(whole, parts)
    assert origin["parts"] == [4, 0, 3] and origin["samples"] == 12
    assert origin["dropped_by_reason"] == {"no winner": 3}
    write_part(late, 0, texts[0])

    rest = iter((1, 2))

    def arrive(seconds):
        number = next(rest)
        write_part(late, number, texts[number])

    monkeypatch.setattr(time, "sleep", arrive)
    records = tmp_path / "late.jsonl", tmp_path / "whole.jsonl"
    tables = PairTable(late, 3), PairTable(whole)
    orders = [PairOrder(table, 6, 4, 0, record) for table, record in zip(tables, records, strict=True)]
    assert list(orders[0]) == list(orders[1])
    assert tables[0].waited > 0 == tables[1].waited and tables[1].parts == 3
    assert [tables[0][i] for i in range(7)] == [tables[1][i] for i in range(7)]
    assert records[0].read_text() == records[1].read_text()
    lines = [json.loads(line) for line in records[0].read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and lines[0]["pairs"] == list("abcd")
    assert Counter(name for line in lines for name in line["pairs"]).keys() == set("abcdefg")


def test_tables_without_a_pair_are_refused(tmp_path):
    table = tmp_path / "t.parquet"
    parts = [write_part(table, number, "") for number in range(2)]
    with pytest.raises(ValueError, match="no pair in any of 2 parts"):
        PairTable(table, 2)
    with pytest.raises(ValueError, match=r"no pair could be built of 8 samples; dropped: {'no winner': 2}"):
        join_parts(table, parts)
    assert not table.exists()
