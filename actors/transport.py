"""Transfer of weight sets from their file to the workers: over a shared file system, the object store, or a broadcast.

A worker is handed a transfer and takes the tensors out of it, one chunk at a time. No process holds more than two
chunks besides the model (a tensor larger than a chunk is a chunk of its own).

- ``SharedFileTransfer``: the worker maps the file into its memory. For workers that see the run directory. On the
  learner's node the pages are those that the learner wrote: shared memory, without a copy in between.
- ``ObjectStoreTransfer``: a process beside the file puts chunks into Ray's object store, where workers on a node share
  them without a copy. Workers in step with each other share a chunk's only copy.
- ``BroadcastTransfer``: one worker reads the file and broadcasts it, over NCCL from GPU to GPU, over gloo otherwise.
  All workers take part at once, so it suits a publication, not a replacement that catches up.

``AutoTransfer`` is the first if the worker sees the file, else the second.

Readers get numpy arrays from the object store without a copy, but not torch tensors. Numpy has no bfloat16, so its
bits travel as int16, which no parameter of the model has.
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

from actors.weights import WeightLayout, Weights, stream
from vargpt_rl.common.rendezvous import rendezvous

CHUNK = 256 * 2**20
"""Most bytes of a chunk."""


class WeightTransfer(Protocol):
    """A weight set in transit. ``layout`` is known first, so that a bad set is rejected before anything is copied."""

    @property
    def layout(self) -> WeightLayout: ...

    def chunks(self) -> Iterator[Weights]:
        """Yield the tensors, in groups."""
        ...


@dataclass(frozen=True)
class SharedFileTransfer:
    """The worker reads the file itself."""

    layout: WeightLayout
    path: Path

    def chunks(self) -> Iterator[Weights]:
        for name, tensor in stream(self.path, self.layout.shapes):
            yield {name: tensor}


@dataclass(frozen=True)
class ObjectStoreTransfer:
    """``chunk_server`` (a ``ChunkServer`` actor) reads the file; the next chunk is fetched ahead."""

    layout: WeightLayout
    path: Path
    chunk_server: ActorHandle

    def chunks(self) -> Iterator[Weights]:
        groups = self.layout.chunks(CHUNK)
        if not groups:
            return
        pending = self.chunk_server.chunk.remote(self.path, groups[0])
        for following in (*groups[1:], None):
            (chunk,) = ray.get(pending)
            if following:
                pending = self.chunk_server.chunk.remote(self.path, following)
            yield {name: _to_torch(array) for name, array in ray.get(chunk).items()}


@dataclass(frozen=True)
class AutoTransfer:
    """A shared file if the worker sees one of ``size`` bytes at ``path``, else the object store."""

    layout: WeightLayout
    path: Path
    chunk_server: ActorHandle
    size: int

    def chunks(self) -> Iterator[Weights]:
        seen = self.path.is_file() and self.path.stat().st_size == self.size
        shared = SharedFileTransfer(self.layout, self.path)
        stored = ObjectStoreTransfer(self.layout, self.path, self.chunk_server)
        yield from (shared if seen else stored).chunks()


class _ChunkServer:
    """Puts chunks of files into the object store and keeps the two requested last."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple[Path, int, str], ray.ObjectRef] = OrderedDict()

    def chunk(self, path: Path, names: list[str]) -> list[ray.ObjectRef]:
        """The ref of a chunk, in a list: Ray would resolve a bare one."""
        key = path, path.stat().st_ino, names[0]  # a file that is replaced has another inode
        if key not in self.kept:
            self.kept[key] = ray.put({name: _to_numpy(tensor) for name, tensor in stream(path, names)})
        self.kept.move_to_end(key)
        while len(self.kept) > 2:
            self.kept.popitem(last=False)
        return [self.kept[key]]


ChunkServer = ray.remote(num_cpus=0)(_ChunkServer)


@dataclass(frozen=True)
class BroadcastTransfer:
    """One rank's part in a broadcast: rank 0 reads ``path``, the others receive.

    ``device`` is "cuda" for NCCL, "cpu" for gloo. RuntimeError if a rank does not arrive, or is lost, in ``timeout_s``.
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
        # A separate group: the process's default group, if any, has other members.
        store = rendezvous(host, port, self.rank, self.world, limit)
        # torch's stubs derive both groups from Backend, not from ProcessGroup.
        if self.device == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            group: dist.ProcessGroup = dist.ProcessGroupNCCL(  # type: ignore[assignment]
                store, self.rank, self.world, options
            )
        else:
            group = dist.ProcessGroupGloo(store, self.rank, self.world, limit)  # type: ignore[assignment]
        for name, read in stream(self.path, self.layout.shapes) if self.rank == 0 else self._empty():
            tensor = read.to(self.device).contiguous()
            group.broadcast([tensor.view(-1).view(torch.uint8)], dist.BroadcastOptions()).wait()
            yield {name: tensor}
        group.barrier().wait()  # rank 0 holds the store: it must not leave before the others are done

    def _empty(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield a tensor to receive into for each name."""
        for name, shape in self.layout.shapes.items():
            yield name, torch.empty(shape, dtype=self.layout.dtypes[name], device=self.device)


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _to_torch(array: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        # Arrays from the object store are read-only; torch warns, but nothing writes to them here.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
