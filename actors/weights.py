"""Weight sets, on disk as a safetensors file and in a live model.

A set is checked against the model before anything is copied, read and applied in place one chunk at a time, and
verified by a checksum of the model's own tensors. ``actors.transport`` moves the chunks.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

Weights = dict[str, torch.Tensor]
"""Tensors by name."""


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
        dtypes = {name: (part[:0] if shapes[name] else file.get_tensor(name)).dtype for name, part in slices.items()}
    return WeightLayout(shapes, dtypes)


def read(path: Path, names: Iterable[str]) -> Weights:
    """Read tensors of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}


def _digest(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def checksum_of_set(tensors: Weights) -> str:
    """``checksum`` of tensors in memory."""
    return _digest((name, tensors[name]) for name in sorted(tensors))


def checksum(path: Path, wanted: Wanted = every) -> str:
    """Hexadecimal blake2b of a file's wanted tensors in the order of their names: name, dtype, shape and bytes.

    Only one tensor at a time is in memory.
    """

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        with safe_open(path, framework="pt") as file:
            for name in sorted(filter(wanted, file.keys())):
                yield name, file.get_tensor(name)

    return _digest(tensors())


def checksum_of(model: torch.nn.Module, dtypes: Mapping[str, torch.dtype]) -> str:
    """``checksum`` of the model's own tensors of these names, cast to the dtypes of the set.

    A model of a wider dtype holds the set exactly, so casting back loses nothing.
    """
    own = model.state_dict()
    return _digest((name, own[name].to("cpu", dtypes[name])) for name in sorted(dtypes))


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
def apply(model: torch.nn.Module, tensors: Weights) -> None:
    """Copy tensors that fit into the model, in place."""
    own = model.state_dict()
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
