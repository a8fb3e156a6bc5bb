"""Transfer of weight sets from their file to the workers: over a shared file system, the object store, or a broadcast.

A worker is handed a transfer and takes the tensors out of it, one chunk at a time. No process holds more than two
chunks besides the model (a tensor larger than a chunk is a chunk of its own).

- ``SharedFileTransfer``: the worker reads the file, mapped into its memory. For workers that see the run directory.
- ``ObjectStoreTransfer``: a process beside the file puts chunks into Ray's object store, where workers on a node share
  them without a copy. Workers that are in step share a chunk's only copy.
- ``BroadcastTransfer``: one worker reads the file and broadcasts it, over NCCL from GPU to GPU, over gloo otherwise.
  All workers take part at once, so it serves for a publication, not for a replacement that catches up.

``AutoTransfer`` is the first where the worker sees the file, else the second.

Numpy arrays go through the object store without being copied in the reader, torch tensors do not. Numpy has no
bfloat16, so its bits travel as int16, which no parameter of the model has.
"""

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import numpy as np
import ray
import torch
import torch.distributed as dist
from ray.actor import ActorHandle

from actors.weights import WeightLayout, Weights, read

CHUNK = 256 * 2**20
"""Bytes of a chunk."""


class WeightTransfer(Protocol):
    """A weight set under way. ``layout`` says what will come, so that it can be refused before anything is copied."""

    layout: WeightLayout

    def chunks(self) -> Iterator[Weights]:
        """The tensors, in groups."""


@dataclass(frozen=True)
class SharedFileTransfer:
    """A file that the worker sees."""

    layout: WeightLayout
    path: Path

    def chunks(self) -> Iterator[Weights]:
        for name in self.layout.shapes:
            yield read(self.path, [name])


@dataclass(frozen=True)
class ObjectStoreTransfer:
    """A file that ``chunk_server`` (a ``ChunkServer`` actor) sees."""

    layout: WeightLayout
    path: Path
    chunk_server: ActorHandle

    def chunks(self) -> Iterator[Weights]:
        groups = self.layout.chunks(CHUNK)
        if not groups:
            return
        coming = self.chunk_server.chunk.remote(self.path, groups[0])
        for following in (*groups[1:], None):
            (chunk,) = ray.get(coming)
            if following:
                coming = self.chunk_server.chunk.remote(self.path, following)
            yield {name: _to_torch(array) for name, array in ray.get(chunk).items()}


@dataclass(frozen=True)
class AutoTransfer:
    """A shared file if the worker sees one of ``size`` bytes at ``path``, else what is on ``chunk_server``."""

    layout: WeightLayout
    path: Path
    chunk_server: ActorHandle
    size: int

    def chunks(self) -> Iterator[Weights]:
        seen = self.path.is_file() and self.path.stat().st_size == self.size
        found = (
            SharedFileTransfer(self.layout, self.path)
            if seen
            else ObjectStoreTransfer(self.layout, self.path, self.chunk_server)
        )
        yield from found.chunks()


class _ChunkServer:
    """Puts chunks of files into the object store; the two that were asked for last stay there."""

    def __init__(self):
        self.kept: OrderedDict[tuple[Path, int, str], ray.ObjectRef] = OrderedDict()

    def chunk(self, path: Path, names: list[str]) -> list[ray.ObjectRef]:
        key = path, path.stat().st_ino, names[0]  # a file that is replaced has another inode
        if key not in self.kept:
            self.kept[key] = ray.put({name: _to_numpy(tensor) for name, tensor in read(path, names).items()})
        self.kept.move_to_end(key)
        while len(self.kept) > 2:
            self.kept.popitem(last=False)
        return [self.kept[key]]


ChunkServer = ray.remote(num_cpus=0)(_ChunkServer)


@dataclass(frozen=True)
class BroadcastTransfer:
    """The part of rank ``rank`` of ``world`` in a broadcast: rank 0 reads ``path``, the others receive.

    ``device`` is where the tensors pass: "cuda" for NCCL, "cpu" for gloo. RuntimeError where a rank does not come, or
    is lost, within ``timeout_s``.
    """

    layout: WeightLayout
    path: Path
    address: tuple[str, int]
    rank: int
    world: int
    device: str
    timeout_s: float

    def chunks(self) -> Iterator[Weights]:
        limit = timedelta(seconds=self.timeout_s)
        host, port = self.address
        # A group of its own: a default group, if the process has one, has other members.
        store = dist.TCPStore(host, port, self.world, is_master=self.rank == 0, timeout=limit)
        if self.device == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            group = dist.ProcessGroupNCCL(store, self.rank, self.world, options)
        else:
            group = dist.ProcessGroupGloo(store, self.rank, self.world, limit)
        for name, shape in self.layout.shapes.items():
            if self.rank == 0:
                tensor = read(self.path, [name])[name].to(self.device).contiguous()
            else:
                tensor = torch.empty(shape, dtype=self.layout.dtypes[name], device=self.device)
            group.broadcast([tensor.view(-1).view(torch.uint8)], dist.BroadcastOptions()).wait()
            yield {name: tensor}
        group.barrier().wait()  # rank 0 holds the store: it must not go before the others have come


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _to_torch(array: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        # Arrays out of the object store are read-only; torch warns, but they are only read here.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
