"""Endless or finite streams of records: sharded over ranks and workers, shuffled, and resumed exactly.

Rows are read in blocks, and each block is shuffled with the seed: a state is then the place where the block begins and
how much of it is used, a few numbers whatever the size of the records. A resumed stream reads the block again. Made
for ``torchdata.stateful_dataloader.StatefulDataLoader``, whose workers share the rows of their rank.
"""

import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from vargpt_rl.data.quarantine import BadRecord, Quarantine
from vargpt_rl.data.records.formats import Fault, Format, Row

_SHORT = reprlib.Repr()
_SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 20, 200, 80


@dataclass(frozen=True)
class ReadOptions:
    """How to read. ``seed`` None keeps the order of the files; ``epochs`` None never ends.

    ``block`` rows are shuffled together and held in memory, encoded images of Parquet rows included. When more than
    ``max_bad_fraction`` of the rows that a worker has read are bad, which is looked at after each block, it stops.
    """

    rank: int = 0
    world: int = 1
    seed: int | None = 0
    block: int = 1000
    epochs: int | None = 1
    max_bad_fraction: float = 0.05

    def __post_init__(self):
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank {self.rank} of {self.world}")
        if self.block < 1 or self.epochs == 0:
            raise ValueError(f"block is {self.block} and epochs is {self.epochs}, expected 1 or more")


class _Part(NamedTuple):
    path: Path
    number: int
    of: int


class _Cursor(NamedTuple):
    """Where a block begins: a pass over the data, the index of a part in it, a row of that part."""

    epoch: int
    part: int
    row: int


class Records(IterableDataset):
    """What ``steps`` make of the rows of ``files``, one step after the other.

    A step that raises `BadRecord` has the row quarantined, in a file of each worker in the folder ``quarantine``. One
    that returns None leaves the row out: it is good, but not meant for this reading.
    Shards are whole parts of files where there are enough of them, else every n-th row of each part; they may differ
    in length. Raises ValueError for a file that is missing.
    """

    def __init__(
        self, files: Sequence[Path], form: Format, steps: Sequence[Callable], quarantine: Path, reading: ReadOptions
    ):
        if missing := [str(path) for path in files if not Path(path).exists()]:
            raise ValueError(f"no such file: {', '.join(missing)}")
        if not files:
            raise ValueError("no files to read")
        self.form, self.steps, self.quarantine, self.reading = form, steps, quarantine, reading
        counted = [(Path(path), form.parts(Path(path))) for path in files]
        self.parts = [_Part(path, number, of) for path, of in counted for number in range(of)]

    def __iter__(self) -> "RecordIterator":
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        return RecordIterator(self, self.reading.rank * workers + number, self.reading.world * workers)


class RecordIterator(Iterator):
    """One shard of `Records`, with a state."""

    def __init__(self, records: Records, shard: int, shards: int):
        self._records, self._reading, self._shard, self._shards = records, records.reading, shard, shards
        self._quarantine = Quarantine(records.quarantine / f"shard-{shard}-of-{shards}.jsonl")
        self._seen = self._lost = self._left_out = self._used = 0
        self._block: list[tuple[str, Row | Fault]] = []
        self._begin = self._end = _Cursor(0, 0, 0)
        self._rows = self._from(self._begin)

    def __next__(self) -> Any:
        while True:
            if self._used == len(self._block):
                self._next_block()
            place, row = self._block[self._used]
            self._used += 1
            self._seen += 1
            try:
                item = self._made(row)
            except BadRecord as fault:
                self._lost += 1
                found = row.found if isinstance(row, Fault) else _SHORT.repr(row)
                self._quarantine.add(place, found, str(fault))
                continue
            if item is not None:
                return item
            self._left_out += 1

    def _made(self, row: Row | Fault) -> Any:
        if isinstance(row, Fault):
            raise BadRecord(row.reason)
        item: Any = row
        for step in self._records.steps:
            item = step(item)
            if item is None:
                return None
        return item

    def _next_block(self) -> None:
        """Raises StopIteration after the last epoch, and ValueError where too many rows are bad."""
        self._quarantine.check(self._seen, self._reading.max_bad_fraction, self._lost)
        self._begin, self._used = self._end, 0
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
        block = list(islice(self._rows, self._reading.block))
        self._end = block[-1][0] if block else self._begin
        found = [(place, row) for _, place, row in block]
        order = range(len(found)) if self._reading.seed is None else self._random(*self._begin).permutation(len(found))
        self._block = [found[at] for at in order]

    def _random(self, *place: int) -> np.random.Generator:
        return np.random.default_rng([self._reading.seed, self._shard, *place])

    def _from(self, cursor: _Cursor) -> Iterator[tuple[_Cursor, str, Row | Fault]]:
        """The rows from ``cursor`` to the end of its epoch: what comes after each, its place, and itself."""
        parts = self._records.parts
        if self._reading.seed is not None:
            order = np.random.default_rng([self._reading.seed, cursor.epoch]).permutation(len(parts))
            parts = [parts[index] for index in order]
        whole = len(parts) >= self._shards
        parts, first, step = (parts[self._shard :: self._shards], 0, 1) if whole else (parts, self._shard, self._shards)
        for index, part in enumerate(parts[cursor.part :], cursor.part):
            start = max(first, cursor.row) if index == cursor.part else first
            for number, row in self._records.form.read(part.path, part.number, start, step):
                within = f"{part.number + 1}:" if part.of > 1 else ""
                yield _Cursor(cursor.epoch, index, number + step), f"{part.path}:{within}{number + 1}", row

    def _setup(self) -> dict[str, Any]:
        """What has to be the same when a state is loaded."""
        chosen = asdict(self._reading)
        return {name: chosen[name] for name in ("seed", "block")} | {"shard": self._shard, "shards": self._shards}

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
        """Raises ValueError for the state of a stream that is set up in another way."""
        if state["setup"] != self._setup():
            raise ValueError(f"the stream was saved as {state['setup']} and is resumed as {self._setup()}")
        self._begin = _Cursor(*state["begin"])
        self._used, self._seen = state["used"], state["seen"]
        self._lost, self._left_out = state["lost"], state["left_out"]
        self._rows = self._from(self._begin)
        self._read_block()
