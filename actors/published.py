"""The weight sets published so far, and the way each reaches a worker."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.transport import AutoTransfer, ChunkServer, ObjectStoreTransfer, SharedFileTransfer, WeightTransfer
from actors.weights import WeightLayout, checksum, layout_of


class WeightSet(NamedTuple):
    """A published set. Its file must stay where it is: replacement workers read it too."""

    version: int
    checksum: str
    layout: WeightLayout
    path: Path


class PublishedWeights:
    """The published sets that are still in use, oldest first.

    Of each file, only tensors whose names ``takes`` accepts are published.
    """

    def __init__(self, transport: str, takes: Callable[[str], bool], chunk_server: ActorHandle | None):
        self.transport = transport
        self.takes = takes
        self.chunk_server = chunk_server
        self.version = 0
        self.sets: list[WeightSet] = []

    def add(self, path: Path, version: int) -> WeightSet:
        """Add a safetensors file; it supersedes earlier sets whose names it all has.

        ValueError unless ``version`` is above the last one.
        """
        if version <= self.version:
            raise ValueError(f"version {version} published after version {self.version}: expected a higher version")
        layout = layout_of(path, self.takes)
        weight_set = WeightSet(version, checksum(path, self.takes), layout, Path(path).resolve())
        self.sets = [old for old in self.sets if not old.layout.shapes.keys() <= layout.shapes.keys()]
        self.sets.append(weight_set)
        self.version = version
        return weight_set

    def transfer(self, weight_set: WeightSet) -> WeightTransfer:
        """Return a transfer of the set to one worker, by the transport that the settings name."""
        layout, path = weight_set.layout, weight_set.path
        if self.transport == "shared_fs":
            return SharedFileTransfer(layout, path)
        if self.transport == "object_store":
            return ObjectStoreTransfer(layout, path, self.chunk_server)
        return AutoTransfer(layout, path, self.chunk_server, path.stat().st_size)

    def replay(self, worker: ActorHandle) -> list[ray.ObjectRef]:
        """Send all sets to a new worker; return the calls to wait for."""
        return [worker.receive.remote(old.version, old.checksum, self.transfer(old)) for old in self.sets]


def start_chunk_server() -> ActorHandle:
    """Start a ``ChunkServer`` on this node, which has the files."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ChunkServer.options(scheduling_strategy=here).remote()
