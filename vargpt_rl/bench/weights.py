"""Speed and memory of weight distribution: ``python -m vargpt_rl.bench.weights [sizes=[0.2,1,4]] [receivers=[1,2,4]]``.

For each way (see ``actors.transport``), size in GB and number of receivers: GB/s at each receiver, as a ratio to a
plain copy of the same bytes in the same run, and by how much a receiver's own memory rose. Receivers hold fp32 tensors
and take a set of them in place, without the checksum that workers make afterwards, whose speed is given beside them.
A case whose receivers do not fit into the memory that is free is left out, and named.
"""

import hashlib
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import ray
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from safetensors.torch import save_file

from actors.transport import (
    CHUNK,
    BroadcastTransfer,
    ChunkServer,
    ObjectStoreTransfer,
    SharedFileTransfer,
    WeightTransfer,
)
from actors.weights import WeightLayout, apply, layout_of
from vargpt_rl.common.command import run_command
from vargpt_rl.common.console import wide_console
from vargpt_rl.common.network import free_port

TENSOR = 64 * 2**20
"""Bytes of a tensor of the sets: that of a wide layer."""
ROOM = 3 * CHUNK
"""Bytes that a receiver needs beside its tensors: two chunks, and what a process has."""


@dataclass
class TransferSettings:
    """``sizes`` in GB; ``folder`` for the files, which needs room for the largest."""

    sizes: list[float] = field(default_factory=lambda: [0.2, 1.0, 4.0])
    receivers: list[int] = field(default_factory=lambda: [1, 2, 4])
    folder: str | None = None

    def __post_init__(self):
        if not self.sizes or min(self.sizes) <= 0:
            raise ValueError(f"sizes={self.sizes}: expected numbers above 0")
        if not self.receivers or min(self.receivers) < 1:
            raise ValueError(f"receivers={self.receivers}: expected numbers of 1 or more")


def _own_memory() -> int:
    """Bytes of this process that are backed by no file and shared with nobody."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@ray.remote(num_cpus=0)
class Receiver:
    """Tensors like those of the set, and what it takes to have them replaced."""

    def __init__(self, layout: WeightLayout):
        names = layout.shapes
        self.module = torch.nn.Module()
        for name in names:
            self.module.register_buffer(name, torch.ones(layout.shapes[name], dtype=layout.dtypes[name]))

    def take(self, transfer: WeightTransfer) -> tuple[float, int]:
        """Seconds, and the most by which memory rose."""
        before, highest, start = _own_memory(), 0, time.perf_counter()
        for chunk in transfer.chunks():
            apply(self.module, chunk)
            highest = max(highest, _own_memory() - before)
        return time.perf_counter() - start, highest

    def first(self) -> float:
        return next(self.module.buffers()).flatten()[0].item()


def plain_copy(size: int) -> float:
    """Bytes/s of copying tensors of ``TENSOR`` bytes in this process."""
    source, target = torch.ones(TENSOR // 4), torch.zeros(TENSOR // 4)
    start = time.perf_counter()
    for _ in range(max(1, size // TENSOR)):
        target.copy_(source)
    return max(1, size // TENSOR) * TENSOR / (time.perf_counter() - start)


def hashing() -> float:
    """Bytes/s of the checksum."""
    data = torch.ones(TENSOR // 4).numpy()
    start = time.perf_counter()
    hashlib.blake2b(data, digest_size=16).hexdigest()
    return TENSOR / (time.perf_counter() - start)


def transfers(way: str, layout: WeightLayout, path: Path, chunk_server, count: int) -> list[WeightTransfer]:
    """One for each receiver."""
    if way == "shared file":
        return [SharedFileTransfer(layout, path)] * count
    if way == "object store":
        return [ObjectStoreTransfer(layout, path, chunk_server)] * count
    address = ("127.0.0.1", free_port())
    return [BroadcastTransfer(layout, path, address, rank, count, "cpu", 300.0) for rank in range(count)]


def bench(settings: TransferSettings) -> int:
    """Print a row a case."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    console = wide_console()
    table = Table(title="weights on their way to workers", title_justify="left", box=SIMPLE_HEAD)
    for column in ("way", "GB", "receivers", "GB/s each", "plain copy GB/s", "ratio", "memory rose MiB"):
        table.add_column(column, justify="left" if column == "way" else "right")
    chunk_server = ChunkServer.remote()
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        for gigabytes in settings.sizes:
            path = Path(folder) / "set.safetensors"
            count = max(1, round(gigabytes * 1e9 / TENSOR))
            save_file({f"t{i:04d}": torch.full((TENSOR // 4096, 1024), float(i + 2)) for i in range(count)}, path)
            layout = layout_of(path)
            for number in settings.receivers:
                needed, free = number * (layout.bytes + ROOM), psutil.virtual_memory().available
                if needed > free:
                    sizes = f"{needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
                    console.print(f"left out: {gigabytes:g} GB to {number} receivers, who need {sizes}")
                    continue
                receivers = [Receiver.remote(layout) for _ in range(number)]
                ray.get([receiver.first.remote() for receiver in receivers])
                for way in ("shared file", "object store", "broadcast"):
                    copied = plain_copy(layout.bytes)
                    sent = transfers(way, layout, path, chunk_server, number)
                    results = ray.get([r.take.remote(p) for r, p in zip(receivers, sent, strict=True)])
                    if ray.get([receiver.first.remote() for receiver in receivers]) != [2.0] * number:
                        raise RuntimeError(f"{way}: a receiver does not hold what was sent")
                    speed = layout.bytes / max(seconds for seconds, _ in results)
                    rose = max(memory for _, memory in results) / 2**20
                    figures = f"{speed / 1e9:.2f}", f"{copied / 1e9:.2f}", f"{speed / copied:.2f}", f"{rose:.0f}"
                    table.add_row(way, f"{layout.bytes / 1e9:.2f}", str(number), *figures)
                for receiver in receivers:
                    ray.kill(receiver)
            os.remove(path)
    console.print(table)
    console.print(f"checksum: {hashing() / 1e9:.2f} GB/s", highlight=False)
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(TransferSettings, bench))
