"""The pairs that DPO trains on, also while later ones are still being built, and the order in which it uses them.

A preference table is one file, or arrives in parts. Once a share of the parts is there, the same share of the steps may
run. So every pair is used equally often, give or take one, and the pairs of a step depend on the table and the seed
alone, not on timing. The order is recorded all the same.
"""

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler

from vargpt_rl.data.preferences import ORIGIN, part_path, read_table

POLL_S = 0.2
"""Seconds between two checks for the next part."""


class PairTable(torch.utils.data.Dataset):
    """The rows of ``table``, or of its ``parts`` parts as they arrive.

    ``rows`` holds the rows read so far (at least one), ``ids`` their pair ids, ``sizes`` the number of rows of each
    part read, ``waited`` the seconds spent waiting for parts, ``micro_batch`` the number of pairs that were scored
    together, if known. ValueError for a table without a pair.
    """

    def __init__(self, table: Path, parts: int = 1):
        self.table = table
        self.parts = parts
        self.waited = 0.0
        self.rows: Dataset
        self.ids: list[str] = []
        self.sizes: list[int] = []
        self.micro_batch: int | None = None
        if table.exists():
            frame = read_table(table)
            self._add(frame)
            self.sizes = frame.attrs.get(ORIGIN, {}).get("parts", self.sizes)
            self.parts = len(self.sizes)
        self.first(1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict:
        return self.rows[row]

    def first(self, parts: int) -> list[int]:
        """Sizes of the first ``parts`` parts (more, until one has a row); waits for them to arrive."""
        while len(self.sizes) < parts:
            self._next()
        if any(self.sizes[:parts]):
            return self.sizes[:parts]
        if parts >= self.parts:
            raise ValueError(f"{self.table}: no pair in any of {self.parts} parts")
        return self.first(parts + 1)

    def _next(self) -> None:
        path = part_path(self.table, len(self.sizes))
        began = time.monotonic()
        while not path.exists():
            time.sleep(POLL_S)
        self.waited += time.monotonic() - began
        self._add(read_table(path))

    def _add(self, frame: pd.DataFrame) -> None:
        rows = Dataset.from_pandas(frame, preserve_index=False)
        if not self.sizes:
            self.micro_batch = frame.attrs.get(ORIGIN, {}).get("micro_batch")
        self.sizes.append(len(rows))
        if len(rows):
            self.rows = concatenate_datasets([self.rows, rows]) if self.ids else rows
            self.ids += rows["pair_id"]


class PairOrder(Sampler[int]):
    """Batches of ``steps`` steps, concatenated: always the least used pairs among those that have arrived.

    New pairs keep the order of the table, which is already random and in which the workers scored them in
    micro-batches: at step 0 policy and reference then run on equal shapes, so that their log-probabilities are equal
    and not only close. Later epochs have random orders of their own. ``record``: a JSONL file with one line per step.
    """

    def __init__(self, table: PairTable, steps: int, batch: int, seed: int, record: Path | None = None):
        self.table = table
        self.steps = steps
        self.batch = batch
        self.seed = seed
        self.record = record

    def __len__(self) -> int:
        return self.steps * self.batch

    def __iter__(self) -> Iterator[int]:
        @cache
        def places(part: int, uses: int) -> list[float]:
            """Random place in [0, 1) of each row of a part, to mix the rows of all parts."""
            size = self.table.sizes[part]
            generator = torch.Generator().manual_seed(self.seed + uses + part * 7919)
            return (torch.randperm(size, generator=generator).argsort() / size).tolist()

        # By uses, descending: place among equals, row, part, row within the part. Those of the level in use are sorted.
        levels: dict[int, list[tuple[float, int, int, int]]] = defaultdict(list)
        uses = 0
        parts = 0
        for step in range(1, self.steps + 1):
            sizes = self.table.first(max(parts, -(-step * self.table.parts // self.steps)))
            if len(sizes) > parts:
                for part in range(parts, len(sizes)):
                    first = sum(sizes[:part])
                    levels[0] += [(first + at, first + at, part, at) for at in range(sizes[part])]
                parts = len(sizes)
                uses = 0
                levels[0].sort(reverse=True)
            batch = []
            for _ in range(self.batch):
                while not levels[uses]:
                    uses += 1
                    levels[uses].sort(reverse=True)
                _, row, part, at = levels[uses].pop()
                levels[uses + 1].append((places(part, uses + 1)[at], row, part, at))
                batch.append(row)
            self._note(step, batch)
            yield from batch

    def _note(self, step: int, batch: list[int]) -> None:
        if self.record:
            line = {"step": step, "pairs": [self.table.ids[row] for row in batch]}
            with self.record.open("w" if step == 1 else "a") as file:
                file.write(json.dumps(line) + "\n")
