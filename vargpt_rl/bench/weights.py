"""Measure weight distribution: ``python -m vargpt_rl.bench.weights [sizes=[0.2,1,4]] [receivers=[1,2,4]]``.

For each transfer (see ``actors.transport``), size and number of receivers: GB/s at each receiver, the ratio to a plain
copy of the same bytes in the same run, and the growth of a receiver's own memory. Receivers hold fp32 tensors and
replace them in place, without the checksum that workers compute afterwards; its speed is printed separately. A case
whose receivers do not fit into free memory is skipped with a message.
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
from vargpt_rl.bench.harness import results_table
from vargpt_rl.common.command import run_command
from vargpt_rl.common.console import wide_console
from vargpt_rl.common.network import free_port

TENSOR = 64 * 2**20
"""Bytes of each tensor, as large as a wide layer's."""
ROOM = 3 * CHUNK
"""Bytes that a receiver needs besides its tensors: two chunks and the process itself."""


@dataclass
class TransferSettings:
    """Cases to measure: each size with each number of receivers."""

    sizes: list[float] = field(default_factory=lambda: [0.2, 1.0, 4.0])
    """Sizes of a weight set in GB."""
    receivers: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Numbers of receivers."""
    folder: str | None = None
    """Folder for the files, with room for the largest; null is the system's temporary folder."""

    def __post_init__(self):
        if not self.sizes or min(self.sizes) <= 0:
            raise ValueError(f"sizes={self.sizes}: expected numbers above 0")
        if not self.receivers or min(self.receivers) < 1:
            raise ValueError(f"receivers={self.receivers}: expected integers of 1 or more")


def _own_memory() -> int:
    """Return this process's anonymous memory in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@ray.remote(num_cpus=0)
class Receiver:
    """Holds tensors like those of a weight set and replaces them."""

    def __init__(self, layout: WeightLayout):
        names = layout.shapes
        self.module = torch.nn.Module()
        for name in names:
            self.module.register_buffer(name, torch.ones(layout.shapes[name], dtype=layout.dtypes[name]))

    def take(self, transfer: WeightTransfer) -> tuple[float, int]:
        """Replace the tensors; return the seconds and the peak growth of memory in bytes."""
        before = _own_memory()
        growth = 0
        start = time.perf_counter()
        for chunk in transfer.chunks():
            apply(self.module, chunk)
            growth = max(growth, _own_memory() - before)
        return time.perf_counter() - start, growth

    def first(self) -> float:
        return next(self.module.buffers()).flatten()[0].item()


def plain_copy(size: int) -> float:
    """Measure the bytes/s of copying tensors of ``TENSOR`` bytes in this process."""
    source, target = torch.ones(TENSOR // 4), torch.zeros(TENSOR // 4)
    start = time.perf_counter()
    for _ in range(max(1, size // TENSOR)):
        target.copy_(source)
    return max(1, size // TENSOR) * TENSOR / (time.perf_counter() - start)


def hashing() -> float:
    """Measure the bytes/s of the checksum."""
    data = torch.ones(TENSOR // 4).numpy()
    start = time.perf_counter()
    hashlib.blake2b(data.data, digest_size=16).hexdigest()
    return TENSOR / (time.perf_counter() - start)


def transfers(kind: str, layout: WeightLayout, path: Path, chunk_server, count: int) -> list[WeightTransfer]:
    """Create a transfer for each receiver."""
    if kind == "shared file":
        return [SharedFileTransfer(layout, path)] * count
    if kind == "object store":
        return [ObjectStoreTransfer(layout, path, chunk_server)] * count
    address = ("127.0.0.1", free_port())
    return [BroadcastTransfer(layout, path, address, rank, count, "cpu", 300.0) for rank in range(count)]


def bench(settings: TransferSettings) -> int:
    """Print a row per case."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    console = wide_console()
    columns = ("transfer", "GB", "receivers", "GB/s each", "plain copy GB/s", "ratio", "memory growth, MiB")
    table = results_table("weight distribution", columns, left=("transfer",))
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
                    sizes = f"{needed / 1e9:.1f} GB, only {free / 1e9:.1f} GB are free"
                    console.print(f"skipped: {gigabytes:g} GB to {number} receivers needs {sizes}")
                    continue
                start = Receiver.remote  # type: ignore[attr-defined]  # ray.remote adds it
                receivers = [start(layout) for _ in range(number)]
                ray.get([receiver.first.remote() for receiver in receivers])
                for kind in ("shared file", "object store", "broadcast"):
                    copied = plain_copy(layout.bytes)
                    sent = transfers(kind, layout, path, chunk_server, number)
                    results = ray.get(
                        [receiver.take.remote(transfer) for receiver, transfer in zip(receivers, sent, strict=True)]
                    )
                    if ray.get([receiver.first.remote() for receiver in receivers]) != [2.0] * number:
                        raise RuntimeError(f"{kind}: expected every receiver to hold the weights that were sent")
                    speed = layout.bytes / max(seconds for seconds, _ in results)
                    growth = max(growth for _, growth in results) / 2**20
                    figures = f"{speed / 1e9:.2f}", f"{copied / 1e9:.2f}", f"{speed / copied:.2f}", f"{growth:.0f}"
                    table.add_row(kind, f"{layout.bytes / 1e9:.2f}", str(number), *figures)
                for receiver in receivers:
                    ray.kill(receiver)
            os.remove(path)
    console.print(table)
    console.print(f"checksum: {hashing() / 1e9:.2f} GB/s", highlight=False)
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(TransferSettings, bench))
