"""Weight sets, on disk as a safetensors file and in a live model.

A set is checked against the model before anything is copied, read and applied in place one chunk at a time, and
verified by a checksum of the model's own tensors. ``actors.transport`` moves the chunks. A checkpoint is not hashed
again to publish it: its marker has the hashes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from vargpt_rl.storage.checkpoint import MARKER, recorded_hashes
from vargpt_rl.storage.hashes import file_hashes, set_checksum, tensor_hash

Weights = dict[str, torch.Tensor]
"""Tensors by name."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Dtypes by their names in safetensors' headers."""


@dataclass(frozen=True)
class WeightLayout:
    """Shape and dtype of each tensor of a set, by name."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    @property
    def bytes(self) -> int:
        return sum(self.size(name) for name in self.shapes)

    def size(self, name: str) -> int:
        """Bytes of one tensor."""
        return int(np.prod(self.shapes[name], dtype=np.int64)) * self.dtypes[name].itemsize

    def chunks(self, limit: int) -> list[list[str]]:
        """All names, in groups of at most ``limit`` bytes; a larger tensor is a group of its own."""
        groups: list[list[str]] = [[]]
        room = limit
        for name in self.shapes:
            if self.size(name) > room and groups[-1]:
                groups.append([])
                room = limit
            groups[-1].append(name)
            room -= self.size(name)
        return [group for group in groups if group]


@dataclass(frozen=True)
class SwapReport:
    """One publication of a weight set."""

    version: int
    checksum: str

    bytes: int
    """Size of the set."""

    seconds: float
    """From reading the set to the last worker's answer."""

    gbytes_per_s: float
    workers: int

    verified: bool
    """True if every worker's own tensors have the published checksum."""


Wanted = Callable[[str], bool]
"""Tells whether the tensor of this name belongs to the set."""


def every(name: str) -> bool:
    """Accept all tensors."""
    return True


def layout_of(path: Path, wanted: Wanted = every) -> WeightLayout:
    """The layout of the wanted tensors of a safetensors file; only its header is read."""
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys() if wanted(name)}  # noqa: SIM118 (not a dict)
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        dtypes = {name: DTYPES[part.get_dtype()] for name, part in slices.items()}
    return WeightLayout(shapes, dtypes)


def stream(path: Path, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors of a safetensors file by name, mapped into memory: reading them copies nothing."""
    with safe_open(path, framework="pt") as file:
        for name in names:
            yield name, file.get_tensor(name)


def checksum_of_set(tensors: Weights) -> str:
    """``checksum`` of tensors in memory."""
    return set_checksum({name: tensor_hash(name, tensor) for name, tensor in tensors.items()})


def checksum(path: Path, wanted: Wanted = every) -> str:
    """Checksum of a file's wanted tensors: names, dtypes, shapes and bytes, in any order.

    That of a checkpoint is the one it was written with. A file without a marker is hashed now.
    """
    hashes = recorded_hashes(path) if path.with_name(MARKER).exists() else file_hashes(path)
    return set_checksum({name: found for name, found in hashes.items() if wanted(name)})


def checksum_of(own: Weights, dtypes: Mapping[str, torch.dtype]) -> str:
    """``checksum`` of a model's own tensors of these names, cast to the dtypes of the set.

    A model of a wider dtype holds the set exactly, so casting back loses nothing.
    """
    return set_checksum({name: tensor_hash(name, own[name].to(dtype)) for name, dtype in dtypes.items()})


def check_fits(model: torch.nn.Module, layout: WeightLayout) -> None:
    """Check a set against a model before loading it.

    KeyError names tensors that the model lacks; ValueError names those of another shape, or of a dtype that the model's
    cannot hold exactly.
    """
    own = model.state_dict()
    unknown = sorted(layout.shapes.keys() - own.keys())
    if unknown:
        raise KeyError(f"the model has no tensors {', '.join(unknown)}")
    misfits = [
        f"{name}: expected {tuple(own[name].shape)} {own[name].dtype}, got {shape} {layout.dtypes[name]}"
        for name, shape in layout.shapes.items()
        if shape != own[name].shape or torch.promote_types(layout.dtypes[name], own[name].dtype) != own[name].dtype
    ]
    if misfits:
        raise ValueError(f"tensors that do not fit: {'; '.join(misfits)}")


@torch.no_grad()
def apply(own: Weights, tensors: Weights) -> None:
    """Copy tensors that fit into a model's own (its ``state_dict``), in place."""
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
