"""The micro-batches of a policy-gradient job, read from files that the driver writes while training runs.

All rows of a batch make one optimizer step (`updates` steps, if it is used repeatedly), then the next file is awaited.
Nothing is read ahead: the next batch is drawn with the weights of this one.
"""

import time
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path

import torch
import torch.distributed as dist

from vargpt_rl.data.batches import PolicyBatchCollator
from vargpt_rl.data.policy_batches import STOP, batch_path, read_policy_batch

POLL_S = 0.2
"""Seconds between two checks for the next batch."""


class Seen(IntEnum):
    """Findings of the main rank while it waits for a batch."""

    NOTHING = 0
    BATCH = 1
    STOP = 2
    SAVE_REQUEST = 3


class PolicyBatches:
    """Data loader of one rank: ``accumulation`` collated micro-batches per step, in the order of the file.

    A batch with fewer rows than ``batch`` is padded with copies of its first row of weight 0, and the other rows get
    weight batch / rows, so that a mean over the step is the mean over the rows. ValueError for a batch with more.
    ``waited`` counts the seconds spent waiting for files.
    """

    def __init__(
        self,
        folder: Path,
        *,
        steps: int,
        updates: int,
        batch: int,
        micro_batch: int,
        collate: PolicyBatchCollator,
        rank: int = 0,
        ranks: int = 1,
        device: torch.device | str = "cpu",
    ):
        self.folder = folder
        self.steps = steps
        self.updates = updates
        self.batch = batch
        self.micro_batch = micro_batch
        self.collate = collate
        self.rank = rank
        self.ranks = ranks
        self.device = device
        self.first_step = 0
        self.save_request: Path | None = None
        self.on_save_request: Callable[[], None] = lambda: None
        self.waited = 0.0

    def __len__(self) -> int:
        return self.steps * self.batch // (self.micro_batch * self.ranks)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        rows: list[dict] = []
        for step in range(self.first_step, self.steps):
            if not rows or step % self.updates == 0:
                path = batch_path(self.folder, step // self.updates)
                if not self._wait(path):
                    return
                rows = self._padded(path, read_policy_batch(path))
            for start in range(self.rank * self.micro_batch, self.batch, self.ranks * self.micro_batch):
                yield self.collate(rows[start : start + self.micro_batch])

    def _padded(self, path: Path, rows: list[dict]) -> list[dict]:
        if len(rows) > self.batch:
            raise ValueError(f"{path}: {len(rows)} images, expected at most recipe.batch={self.batch}")
        weighted = [row | {"weight": self.batch / len(rows)} for row in rows]
        return weighted + [rows[0] | {"weight": 0.0, "group": -1}] * (self.batch - len(rows))

    def _wait(self, path: Path) -> bool:
        """Wait for a batch, serving requests to save a checkpoint; False if training is to stop instead."""
        began = time.monotonic()
        while (seen := self._agree(self._look(path))) not in (Seen.BATCH, Seen.STOP):
            if seen == Seen.SAVE_REQUEST:
                self.on_save_request()
            else:
                time.sleep(POLL_S)
        while seen == Seen.BATCH and not path.exists():  # on a network file system a rank may see it later
            time.sleep(POLL_S)
        self.waited += time.monotonic() - began
        return seen == Seen.BATCH

    def _look(self, path: Path) -> Seen:
        if path.exists():
            return Seen.BATCH
        if (self.folder / STOP).exists():
            return Seen.STOP
        if self.save_request is not None and self.save_request.exists():
            return Seen.SAVE_REQUEST
        return Seen.NOTHING

    def _agree(self, seen: Seen) -> Seen:
        """Share the main rank's findings, since all ranks must act on the same."""
        if not dist.is_initialized():
            return seen
        shared = torch.tensor(int(seen), device=self.device)
        dist.broadcast(shared, 0)
        return Seen(int(shared.item()))
