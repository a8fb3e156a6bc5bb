"""Weight sets on disk: the tensors that a stage trained, and how they add up to a whole model.

A checkpoint is a directory with ``weights.safetensors`` and, written last, ``COMPLETE`` (JSON: size and blake2b of the
weights). It is made under a temporary name, synced, and renamed, so a directory without its marker never counts.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

WEIGHTS, MARKER = "weights.safetensors", "COMPLETE"


def sync(path: Path) -> None:
    """Have a file's contents, or a folder's entries, written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` at once: never seen half written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def save_checkpoint(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Write a weight set; an older one of the same name is replaced only once this one is complete."""
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = temporary / WEIGHTS
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights)
    sync(weights)
    marker = {"bytes": weights.stat().st_size, "blake2b": _digest(weights)}
    write_atomically(temporary / MARKER, json.dumps(marker).encode())
    if directory.exists():
        shutil.rmtree(directory)
    os.replace(temporary, directory)
    sync(directory.parent)
    return directory


def check_checkpoint(directory: Path) -> Path:
    """The weights file of a complete checkpoint. ValueError, naming it, if it is incomplete or its bytes changed."""
    marker, weights = directory / MARKER, directory / WEIGHTS
    if not marker.exists() or not weights.exists():
        raise ValueError(f"checkpoint {directory}: incomplete, expected {WEIGHTS} and {MARKER}")
    expected = json.loads(marker.read_text())
    if weights.stat().st_size != expected["bytes"] or _digest(weights) != expected["blake2b"]:
        raise ValueError(f"checkpoint {directory}: {WEIGHTS} is not what was written (size or blake2b differs)")
    return weights


@torch.no_grad()
def load_weights_into(model: torch.nn.Module, directories: Iterable[Path]) -> None:
    """Copy weight sets into a model, in order. ValueError for a tensor that the model has not, or in another shape."""
    own = model.state_dict()
    for directory in directories:
        path = check_checkpoint(directory)
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_tensor(name)
                if name not in own or own[name].shape != tensor.shape:
                    expected = tuple(own[name].shape) if name in own else "no such tensor"
                    raise ValueError(f"{path}: tensor {name} of shape {tuple(tensor.shape)}, the model has {expected}")
                own[name].copy_(tensor)
