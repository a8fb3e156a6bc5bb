"""Measure weight distribution: ``python -m vargpt_rl.bench.weights [sizes=[0.2,1,4]] [receivers=[1,2,4]]``.

For each transfer (see ``actors.transport``), size and number of receivers: GB/s at each receiver, alone and with the
checksum of the loaded tensors, the ratios of both to a plain copy of the same bytes in the same run, and the growth of
a receiver's own memory. Receivers hold fp32 tensors and replace them in place. A case whose receivers do not fit into
free memory is skipped with a message. Below the table: GB/s of the checksum, and the seconds to save, publish and probe
the trained tensors of the embedded model, with one worker.
"""

import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import ray
import torch
from rich.table import Table
from safetensors.torch import save_file

from actors.cluster import unnoted
from actors.config import RolloutConfig
from actors.pool import RolloutPool
from actors.resources import Placement
from actors.transport import (
    CHUNK,
    BroadcastTransfer,
    ChunkServer,
    ObjectStoreTransfer,
    SharedFileTransfer,
    WeightTransfer,
)
from actors.weights import WeightLayout, apply, checksum, checksum_of, layout_of
from vargpt_rl.bench.harness import results_table, timed
from vargpt_rl.common.command import run_command
from vargpt_rl.common.console import print_table, wide_console
from vargpt_rl.common.network import free_port
from vargpt_rl.common.settings import Count, Positive
from vargpt_rl.data.sources import ShapesConfig, ShapesSource
from vargpt_rl.driver.training import probe_of
from vargpt_rl.model.families import load_model
from vargpt_rl.model.hub import EMBEDDED
from vargpt_rl.stages import STAGES, freeze
from vargpt_rl.storage.checkpoint import WEIGHTS, save_checkpoint
from vargpt_rl.storage.hashes import tensor_hash

TENSOR = 64 * 2**20
"""Bytes of each tensor, as large as a wide layer's."""
TRIES = 3
"""Tries of each case, in turn with those of the plain copy; the best of each count."""
ROOM = 3 * CHUNK
"""Bytes that a receiver needs besides its tensors: two chunks and the process itself."""


@dataclass
class TransferSettings:
    """Cases to measure: each size with each number of receivers."""

    sizes: list[Positive] = field(default_factory=lambda: [0.2, 1.0, 4.0])
    """Sizes of a weight set in GB."""
    receivers: list[Count] = field(default_factory=lambda: [1, 2, 4])
    """Numbers of receivers."""
    folder: str | None = None
    """Folder for the files, with room for the largest; null is the system's temporary folder."""

    def __post_init__(self):
        if not self.sizes or not self.receivers:
            raise ValueError(f"sizes={self.sizes} receivers={self.receivers}: expected one or more of each")


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

    def take(self, transfer: WeightTransfer, expected: str) -> tuple[float, float, int]:
        """Replace the tensors and verify them; return the seconds of the first, of both, and the growth of memory.

        RuntimeError if the tensors do not have the expected checksum.
        """
        before = _own_memory()
        growth = 0
        start = time.perf_counter()
        own = self.module.state_dict()
        for chunk in transfer.chunks():
            apply(own, chunk)
            growth = max(growth, _own_memory() - before)
        copied = time.perf_counter() - start
        if checksum_of(own, transfer.layout.dtypes) != expected:
            raise RuntimeError(f"{type(transfer).__name__}: expected the receiver to hold the weights that were sent")
        return copied, time.perf_counter() - start, growth

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
    data = torch.ones(TENSOR // 4)
    seconds = min(timed(tensor_hash, "t", data)[0] for _ in range(3))
    return TENSOR / seconds


def transfers(kind: str, layout: WeightLayout, path: Path, chunk_server, count: int) -> list[WeightTransfer]:
    """Create a transfer for each receiver."""
    if kind == "shared file":
        return [SharedFileTransfer(layout, path)] * count
    if kind == "object store":
        return [ObjectStoreTransfer(layout, path, chunk_server)] * count
    address = ("127.0.0.1", free_port())
    return [BroadcastTransfer(layout, path, address, rank, count, "cpu", 300.0) for rank in range(count)]


def measure_receivers(table: Table, path: Path, chunk_server, number: int) -> None:
    """Add a row for each transfer of a file to ``number`` receivers."""
    layout, expected = layout_of(path), checksum(path)
    create = Receiver.remote  # type: ignore[attr-defined]  # ray.remote adds it
    receivers = [create(layout) for _ in range(number)]
    ray.get([receiver.first.remote() for receiver in receivers])
    for kind in ("shared file", "object store", "broadcast"):
        tries: list[tuple[float, float, int]] = []
        copied = 0.0
        for _ in range(TRIES):
            copied = max(copied, plain_copy(layout.bytes))
            sent = transfers(kind, layout, path, chunk_server, number)
            refs = [receiver.take.remote(each, expected) for receiver, each in zip(receivers, sent, strict=True)]
            alone, verified, growth = (max(values) for values in zip(*ray.get(refs), strict=True))
            tries.append((alone, verified, growth))
        speeds = (layout.bytes / min(each[i] for each in tries) for i in range(2))
        growth = max(each[2] for each in tries)
        figures = (f"{speed / 1e9:.2f} ({speed / copied:.2f})" for speed in speeds)
        size, peak = f"{layout.bytes / 1e9:.2f}", f"{growth / 2**20:.0f}"
        table.add_row(kind, size, str(number), *figures, f"{copied / 1e9:.2f}", peak)
    for receiver in receivers:
        ray.kill(receiver)


def swaps(folder: Path) -> dict[str, float]:
    """Measure saving, publishing to one worker and probing the embedded model's trained tensors; least seconds of 5."""
    model = str(EMBEDDED)
    source = ShapesSource(ShapesConfig())
    pool = RolloutPool(
        RolloutConfig(workers=1), Placement(workers=1, worker_options={"num_cpus": 0}), model, source, note=unnoted
    )
    trained = freeze(whole := load_model(model, torch.float32), STAGES["dpo"])
    tensors = {name: whole.state_dict()[name] for name in trained}
    probe = probe_of(model, 256, seed=0)
    found: dict[str, list[float]] = {"save": [], "publish": [], "probe": []}
    for version in range(1, 6):
        saved, directory = timed(save_checkpoint, folder / f"step-{version}", tensors)
        published, _ = timed(pool.publish, directory / WEIGHTS, version)
        probed, _ = timed(pool.probe, probe.prompt, probe.bits, probe.resolution)
        for name, seconds in zip(found, (saved, published, probed), strict=True):
            found[name].append(seconds)
    pool.close()
    size = sum(tensor.nbytes for tensor in tensors.values())
    return {"bytes": size, **{name: min(seconds) for name, seconds in found.items()}}


def bench(settings: TransferSettings) -> int:
    """Print a row per case."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    console = wide_console()
    columns = ("transfer", "GB", "receivers", "GB/s each", "with checksum", "plain copy GB/s", "memory growth, MiB")
    table = results_table("weight distribution (in parentheses: of a plain copy)", columns, left=("transfer",))
    chunk_server = ChunkServer.remote()
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        for gigabytes in settings.sizes:
            path = Path(folder) / "set.safetensors"
            count = max(1, round(gigabytes * 1e9 / TENSOR))
            save_file({f"t{i:04d}": torch.full((TENSOR // 4096, 1024), float(i + 2)) for i in range(count)}, path)
            for number in settings.receivers:
                needed, free = number * (path.stat().st_size + ROOM), psutil.virtual_memory().available
                if needed > free:
                    sizes = f"{needed / 1e9:.1f} GB, only {free / 1e9:.1f} GB are free"
                    console.print(f"skipped: {gigabytes:g} GB to {number} receivers needs {sizes}")
                    continue
                measure_receivers(table, path, chunk_server, number)
            os.remove(path)
        print_table(table, console)
        console.print(f"checksum: {hashing() / 1e9:.2f} GB/s", highlight=False)
        tiny = swaps(Path(folder))
    seconds = ", ".join(f"{name} {1000 * tiny[name]:.0f} ms" for name in ("save", "publish", "probe"))
    console.print(f"embedded model, {tiny['bytes'] / 1e6:.1f} MB to one worker: {seconds}", highlight=False)
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(TransferSettings, bench))
