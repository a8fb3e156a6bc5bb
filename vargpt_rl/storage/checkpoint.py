"""Weight sets on disk: the tensors that a stage trained, and how they add up to a whole model.

A checkpoint is a directory with ``weights.safetensors`` and, written last, ``COMPLETE`` (JSON: size and blake2b of the
weights). It is made under a temporary name, synced, and renamed, so a directory without its marker never counts.
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vargpt_rl.common.failpoints import point
from vargpt_rl.storage.files import check_room, digest, sync, write_atomically

WEIGHTS, MARKER = "weights.safetensors", "COMPLETE"


@dataclass(frozen=True)
class Policy:
    """A model directory and the weight sets applied to it, in order: later sets override earlier ones."""

    model: str
    weights: tuple[Path, ...] = ()

    def plus(self, weights: Path) -> "Policy":
        """Return this policy with one more weight set applied."""
        return Policy(self.model, (*self.weights, weights))


def save_checkpoint(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Write a weight set; an older one of the same name is replaced only once this one is complete.

    OSError where there is no room for it.
    """
    temporary, name = directory.with_name(f".{directory.name}"), f"{directory.parent.name}/{directory.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        check_room(temporary, sum(tensor.nbytes for tensor in tensors.values()))
        _write(temporary, tensors)
    except OSError:
        shutil.rmtree(temporary)  # the disk is full: it is not to stay so
        raise
    point(f"{name}/written")
    if directory.exists():
        shutil.rmtree(directory)
    point(f"{name}/removed")
    os.replace(temporary, directory)
    sync(directory.parent)
    point(f"{name}/there")
    return directory


def _write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    weights = folder / WEIGHTS
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights)
    except SafetensorError as error:
        raise OSError(f"{weights}: {error}") from error
    sync(weights)
    point(f"{folder.parent.name}/{folder.name[1:]}/unmarked")
    marker = {"bytes": weights.stat().st_size, "blake2b": digest(weights)}
    write_atomically(folder / MARKER, json.dumps(marker).encode())


def check_checkpoint(directory: Path) -> Path:
    """The weights file of a complete checkpoint. ValueError, naming it, if it is incomplete or its bytes changed."""
    marker, weights = directory / MARKER, directory / WEIGHTS
    if not marker.exists() or not weights.exists():
        raise ValueError(f"checkpoint {directory}: incomplete, expected {WEIGHTS} and {MARKER}")
    expected = json.loads(marker.read_text())
    if weights.stat().st_size != expected["bytes"] or digest(weights) != expected["blake2b"]:
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
