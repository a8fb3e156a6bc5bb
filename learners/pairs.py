"""The pairs that DPO trains on, also while the rest of them is still being made, and the order of them.

A preference table is one file, or comes in parts, one after another. As large a share of the steps is taken as there is
of the parts. So in the end every pair was used as often as any other, or once more, and which pairs a step has follows
from the table and the seed alone, not from who was faster. The order is recorded all the same.
"""

import json
import time
from collections.abc import Iterator
from functools import cache
from heapq import heapify, heapreplace
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler

from vargpt_rl.data.preferences import ORIGIN, part_path, read_table

LOOK_S = 0.2
"""Seconds between two looks for the next part."""


class PairTable(torch.utils.data.Dataset):
    """The rows of ``table``, or of its ``parts`` parts as they come; ``waited`` counts the seconds without work.

    ``rows`` are those read so far, at least one, ``ids`` their pair ids, and ``sizes`` the rows of each part.
    ValueError for a table without a pair.
    """

    def __init__(self, table: Path, parts: int = 1):
        self.table, self.parts, self.waited = table, parts, 0.0
        self.rows, self.ids, self.sizes = None, [], []
        if table.exists():
            frame = read_table(table)
            self._add(Dataset.from_pandas(frame, preserve_index=False))
            self.sizes = frame.attrs.get(ORIGIN, {}).get("parts", self.sizes)
            self.parts = len(self.sizes)
        self.first(1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict:
        return self.rows[row]

    def first(self, parts: int) -> list[int]:
        """Sizes of the first ``parts`` parts, and of the next ones if those are empty; waits until they are there."""
        while len(self.sizes) < parts:
            self._next()
        if any(self.sizes[:parts]):
            return self.sizes[:parts]
        if parts >= self.parts:
            raise ValueError(f"{self.table}: no pair in any of {self.parts} parts")
        return self.first(parts + 1)

    def _next(self) -> None:
        path, began = part_path(self.table, len(self.sizes)), time.monotonic()
        while not path.exists():
            time.sleep(LOOK_S)
        self.waited += time.monotonic() - began
        self._add(Dataset.from_pandas(read_table(path), preserve_index=False))

    def _add(self, rows: Dataset) -> None:
        self.sizes.append(len(rows))
        if len(rows):
            self.ids += rows["pair_id"]
            self.rows = rows if self.rows is None else concatenate_datasets([self.rows, rows])


class PairOrder(Sampler[int]):
    """Batches of ``steps`` steps, one after another: always the pairs that were used least among those that are there.

    New pairs come in the order of the table, which is random already, and in which the workers scored them in
    micro-batches: at step 0 policy and reference then run on equal shapes, and their log-probabilities are equal, not
    only close. Later rounds are in a random order of their own. ``record``: a file that gets a line a step.
    """

    def __init__(self, table: PairTable, steps: int, batch: int, seed: int, record: Path | None = None):
        self.table, self.steps, self.batch, self.seed, self.record = table, steps, batch, seed, record

    def __len__(self) -> int:
        return self.steps * self.batch

    def __iter__(self) -> Iterator[int]:
        @cache
        def places(part: int, uses: int) -> list[float]:
            """Of each row of a part, from 0 to 1: a random order that mixes all parts."""
            size = self.table.sizes[part]
            generator = torch.Generator().manual_seed(self.seed + uses + part * 7919)
            return (torch.randperm(size, generator=generator).argsort() / size).tolist()

        queue: list[tuple[int, float, int, int, int]] = []  # uses, place among equals, row, its part, row in the part
        parts = 0
        for step in range(1, self.steps + 1):
            sizes = self.table.first(max(parts, -(-step * self.table.parts // self.steps)))
            for part in range(parts, len(sizes)):
                rows = enumerate(range(sum(sizes[:part]), sum(sizes[: part + 1])))
                queue += [(0, row, row, part, at) for at, row in rows]
            parts = len(sizes)
            heapify(queue)
            batch = []
            for _ in range(self.batch):
                uses, _, row, part, at = queue[0]
                heapreplace(queue, (uses + 1, places(part, uses + 1)[at], row, part, at))
                batch.append(row)
            self._note(step, batch)
            yield from batch

    def _note(self, step: int, batch: list[int]) -> None:
        if self.record:
            line = {"step": step, "pairs": [self.table.ids[row] for row in batch]}
            with self.record.open("w" if step == 1 else "a") as file:
                file.write(json.dumps(line) + "\n")
