"""Readers of records: endless or finite, sharded over ranks and workers, shuffled, and resumed exactly.

Rows are read in blocks, and each block is shuffled with the seed. A state is then where the block begins and how much
of it is used: a few numbers, whatever the size of the records. A resumed reader reads its block again. Made for
``torchdata.stateful_dataloader.StatefulDataLoader``, whose workers share the rows of their rank.

The streaming mode of ``datasets`` does not serve: it raises at the first malformed line, and it loses the rows of its
shuffle buffer on resuming.
"""

import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from vargpt_rl.common.settings import Count, Share, check_ranges
from vargpt_rl.data.quarantine import BadRecord, Quarantine
from vargpt_rl.data.records.formats import Fault, Format, LeftOut

BLOCK_BYTES = 2**29
"""Most bytes of a block, beyond which it is cut short: 1000 rows of Parquet may each bring a large image."""
_SHORT = reprlib.Repr()
_SHORT.maxdict = 20
_SHORT.maxstring = 200
_SHORT.maxother = 80


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Options for reading records."""

    rank: int = 0
    """This process among the ``world`` processes that share the records."""
    world: int = 1
    seed: int | None = 0
    """Seed of the order of rows; None keeps the order of the files."""
    block: Count = 1000
    """Rows that are shuffled together and held in memory, encoded images of Parquet rows included."""
    epochs: Count | None = 1
    """Passes over the records; None never ends."""
    max_bad_fraction: Share = 0.05
    """Reading stops if more of the rows that a worker has read are bad; checked after each block."""

    def __post_init__(self):
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank={self.rank}: expected 0 or more and less than world={self.world}")
        check_ranges(ReadOptions, self)


class Part(Protocol):
    """Rows that can be read on their own: a file, a part of one, or a list."""

    def read(self, start: int, step: int) -> Iterator[tuple[int, Any]]:
        """Yield the rows start, start + step, start + 2 * step, ..., each with its number."""
        ...

    def place(self, number: int) -> str:
        """Return the location of a row, for the quarantine."""
        ...


@dataclass(frozen=True)
class FilePart:
    """Part ``index`` of the ``count`` parts of a file."""

    path: Path
    form: Format
    index: int
    count: int

    def read(self, start: int, step: int) -> Iterator[tuple[int, Any]]:
        return self.form.read(self.path, self.index, start, step)

    def place(self, number: int) -> str:
        within = f"{self.index + 1}:" if self.count > 1 else ""
        return f"{self.path}:{within}{number + 1}"


@dataclass(frozen=True)
class ListPart:
    """Rows held in memory; ``name`` stands for their file."""

    name: str
    rows: Sequence[Any]

    def read(self, start: int, step: int) -> Iterator[tuple[int, Any]]:
        return islice(enumerate(self.rows), start, None, step)

    def place(self, number: int) -> str:
        return f"{self.name}:{number + 1}"


def file_parts(files: Iterable[Path], form: Format) -> list[Part]:
    """Return all parts of these files. ValueError if there are none, or one is missing or of another kind."""
    paths = [Path(path) for path in files]
    if missing := [str(path) for path in paths if not path.exists()]:
        raise ValueError(f"no such file: {', '.join(missing)}")
    if not paths:
        raise ValueError("no files to read")
    for path in paths:
        form.check(path)
    counted = [(path, form.parts(path)) for path in paths]
    return [FilePart(path, form, index, count) for path, count in counted for index in range(count)]


class _Cursor(NamedTuple):
    """Start of a block: an epoch, the index of a part in it, a row of that part."""

    epoch: int
    part: int
    row: int


class Records(IterableDataset):
    """The rows of ``parts`` after ``steps``, functions that are applied one after the other.

    If a step raises `BadRecord`, the row is quarantined: each worker has a file in the folder ``quarantine``. If a
    step returns None, the row is left out: it is good, but not for this reader.

    Shards are whole parts if there are enough, else every n-th row of each part. They may differ in length.
    """

    def __init__(self, parts: Sequence[Part], steps: Sequence[Callable], quarantine: Path, reading: ReadOptions):
        self.parts = list(parts)
        self.steps = steps
        self.quarantine = quarantine
        self.reading = reading

    def __iter__(self) -> "RecordIterator":
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        return RecordIterator(self, self.reading.rank * workers + number, self.reading.world * workers)


def _held_bytes(value: Any) -> int:
    """Return the bytes of the encoded images in a row."""
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(_held_bytes(item) for item in value.values())
    return sum(_held_bytes(item) for item in value) if isinstance(value, list) else 0


class RecordIterator(Iterator):
    """One shard of `Records`, with a state."""

    def __init__(self, records: Records, shard: int, shards: int):
        self._records = records
        self._reading = records.reading
        self._shard = shard
        self._shards = shards
        self._quarantine = Quarantine(records.quarantine / f"shard-{shard}-of-{shards}.jsonl")
        self._seen = 0
        self._lost = 0
        self._left_out = 0
        self._block: list[tuple[str, Any]] = []
        self._used = 0
        self._begin = _Cursor(0, 0, 0)
        self._end = self._begin
        self._rows = self._from(self._begin)

    def __next__(self) -> Any:
        while True:
            if self._used == len(self._block):
                self._next_block()
            place, row = self._block[self._used]
            self._used += 1
            self._seen += 1
            try:
                item = self._apply_steps(row)
            except BadRecord as fault:
                self._lost += 1
                found = row.found if isinstance(row, Fault) else _SHORT.repr(row)
                self._quarantine.add(place, found, str(fault))
                continue
            if item is not None:
                return item
            self._left_out += 1

    def _apply_steps(self, row: Any) -> Any:
        if isinstance(row, Fault):
            raise BadRecord(row.reason)
        item: Any = row
        for step in self._records.steps:
            item = step(item)
            if item is None:
                return None
        return item

    def _next_block(self) -> None:
        """Raises StopIteration after the last epoch, and ValueError if too many rows are bad."""
        self._quarantine.check(self._seen, self._reading.max_bad_fraction, self._lost)
        self._begin = self._end
        self._used = 0
        self._read_block()
        while not self._block:
            if self._begin.epoch + 1 == self._reading.epochs:
                raise StopIteration
            if self._seen == self._lost + self._left_out:
                raise ValueError(f"no usable record in shard {self._shard} of {self._shards}")
            self._begin = _Cursor(self._begin.epoch + 1, 0, 0)
            self._rows = self._from(self._begin)
            self._read_block()

    def _read_block(self) -> None:
        block: list[tuple[_Cursor, str, Any]] = []
        size = 0
        for cursor, place, row in self._rows:
            if isinstance(row, LeftOut):  # no row: after a resume it may come again
                self._quarantine.add(place, row.found, row.reason, lost=False)
                continue
            block.append((cursor, place, row))
            size += _held_bytes(row)
            if len(block) == self._reading.block or size > BLOCK_BYTES:
                break
        self._end = block[-1][0] if block else self._begin
        found = [(place, row) for _, place, row in block]
        order = range(len(found)) if self._reading.seed is None else self._random(*self._begin).permutation(len(found))
        self._block = [found[at] for at in order]

    def _random(self, *place: int) -> np.random.Generator:
        assert self._reading.seed is not None  # without a seed, rows are read in order
        return np.random.default_rng([self._reading.seed, self._shard, *place])

    def _from(self, cursor: _Cursor) -> Iterator[tuple[_Cursor, str, Any]]:
        """Yield the rows from ``cursor`` to the end of its epoch: the cursor after each, its place, and itself."""
        parts = self._records.parts
        if self._reading.seed is not None:
            order = np.random.default_rng([self._reading.seed, cursor.epoch]).permutation(len(parts))
            parts = [parts[index] for index in order]
        first, step = self._shard, self._shards
        if len(parts) >= self._shards:
            parts = parts[self._shard :: self._shards]
            first, step = 0, 1
        for index, part in enumerate(parts[cursor.part :], cursor.part):
            start = max(first, cursor.row) if index == cursor.part else first
            for number, row in part.read(start, step):
                yield _Cursor(cursor.epoch, index, number + step), part.place(number), row

    def _setup(self) -> dict[str, Any]:
        """Return the options that must be the same when a state is loaded."""
        return {
            "seed": self._reading.seed,
            "block": self._reading.block,
            "shard": self._shard,
            "shards": self._shards,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "setup": self._setup(),
            "begin": list(self._begin),
            "used": self._used,
            "seen": self._seen,
            "lost": self._lost,
            "left_out": self._left_out,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for the state of a reader with another set-up."""
        if state["setup"] != self._setup():
            raise ValueError(f"the reader was saved as {state['setup']} and is resumed as {self._setup()}")
        self._begin = _Cursor(*state["begin"])
        self._used = state["used"]
        self._seen = state["seen"]
        self._lost = state["lost"]
        self._left_out = state["left_out"]
        self._rows = self._from(self._begin)
        self._read_block()
