"""Weight sets on their way from learners to workers: read from safetensors, sent as numpy, applied in place, verified.

Numpy arrays go through Ray's object store without being copied in the reader, torch tensors do not. Numpy has no
bfloat16, so its bits travel as int16, which no parameter of the model has.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

Weights = dict[str, np.ndarray]
"""Tensor by name; int16 stands for bfloat16."""


@dataclass(frozen=True)
class SwapReport:
    """One publication: ``bytes`` of the set, ``seconds`` from reading it to the last worker's answer.

    ``verified``: every worker's own tensors have the published checksum.
    """

    version: int
    checksum: str
    bytes: int
    seconds: float
    gbytes_per_s: float
    workers: int
    verified: bool


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def to_torch(array: np.ndarray) -> torch.Tensor:
    """The same numbers as a tensor, not copied: only to be read."""
    with warnings.catch_warnings():
        # Arrays out of the object store are read-only; torch warns, but they are only read here.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor


def load_weights(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> Weights:
    """The tensors of a safetensors file whose names are wanted."""
    with safe_open(path, framework="pt") as file:
        return {name: _to_numpy(file.get_tensor(name)) for name in file.keys() if wanted(name)}  # noqa: SIM118


def size_of(tensors: Weights) -> int:
    """Bytes of a weight set."""
    return sum(array.nbytes for array in tensors.values())


def _digest(named: Iterable[tuple[str, np.ndarray]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, array in named:
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def checksum(tensors: Weights) -> str:
    """Hexadecimal blake2b over names in order, dtypes, shapes and bytes."""
    return _digest((name, tensors[name]) for name in sorted(tensors))


def dtypes_of(tensors: Weights) -> dict[str, torch.dtype]:
    """Torch dtype of each tensor of a set."""
    return {name: to_torch(array[:0] if array.ndim else array).dtype for name, array in tensors.items()}


def checksum_of(model: torch.nn.Module, dtypes: Mapping[str, torch.dtype]) -> str:
    """``checksum`` of what the model itself holds under these names, in the dtypes of the set it was given.

    A model of wider dtype holds the set exactly, so casting back loses nothing.
    """
    own = model.state_dict()
    return _digest((name, _to_numpy(own[name].to("cpu", dtypes[name]))) for name in sorted(dtypes))


@torch.no_grad()
def apply(model: torch.nn.Module, tensors: Weights) -> None:
    """Copy a weight set into the model's own tensors, in place; the model is untouched when the set does not fit.

    KeyError names tensors that the model does not have, ValueError those of another shape, or of a dtype that the
    model's cannot hold exactly.
    """
    own = model.state_dict()
    unknown = sorted(tensors.keys() - own.keys())
    if unknown:
        raise KeyError(f"not tensors of the model: {', '.join(unknown)}")
    given = {name: to_torch(array) for name, array in tensors.items()}
    misfits = [
        f"{name} is {tuple(tensor.shape)} {tensor.dtype}, the model's {tuple(own[name].shape)} {own[name].dtype}"
        for name, tensor in given.items()
        if tensor.shape != own[name].shape or torch.promote_types(tensor.dtype, own[name].dtype) != own[name].dtype
    ]
    if misfits:
        raise ValueError(f"tensors that do not fit: {'; '.join(misfits)}")
    for name, tensor in given.items():
        own[name].copy_(tensor)
