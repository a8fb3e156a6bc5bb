"""Weight sets on disk: the tensors that one stage trained. Applied in order, they turn the start model into a policy.

A checkpoint is a directory with ``weights.safetensors`` and ``COMPLETE`` (JSON: the file's size, each tensor's hash).
A directory without that marker is never read. Tensors are hashed once, when they are written.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import filterfalse
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vargpt_rl.common.failpoints import point
from vargpt_rl.model.adapter import AdapterConfig, attach, fuse
from vargpt_rl.model.families import family_of, load_config
from vargpt_rl.model.four_bit import quantise
from vargpt_rl.model.unified import Unified
from vargpt_rl.storage.files import atomic_dir, check_free_space
from vargpt_rl.storage.hashes import file_hashes, tensor_hash

WEIGHTS = "weights.safetensors"
MARKER = "COMPLETE"


@dataclass(frozen=True)
class Policy:
    """A model directory and the weight sets applied to it, in order: later sets override earlier ones.

    With an ``adapter`` the sets hold its tensors, and those of parts that train in full beside it.
    """

    model: str
    weights: tuple[Path, ...] = ()
    adapter: AdapterConfig | None = None

    def plus(self, weights: Path) -> "Policy":
        """Return this policy with one more weight set applied."""
        return replace(self, weights=(*self.weights, weights))


def save_checkpoint(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Write a weight set. An older one of the same name is kept until the new one is complete.

    Raises OSError if the disk is too small.
    """
    with atomic_dir(directory) as folder:
        check_free_space(folder, sum(tensor.nbytes for tensor in tensors.values()))
        weights = folder / WEIGHTS
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            save_file(contiguous, weights)
        except SafetensorError as error:
            raise OSError(f"{weights}: {error}") from error
        point(f"{directory.parent.name}/{directory.name}/unmarked")
        hashes = {name: tensor_hash(name, tensor) for name, tensor in contiguous.items()}
        # Not synced by itself: the folder is, before it gets its name.
        (folder / MARKER).write_text(json.dumps({"bytes": weights.stat().st_size, "xxh3_128": hashes}))
    return directory


def recorded_hashes(weights: Path) -> dict[str, str]:
    """Return the hash of each tensor as it was when the weights file was written; only the marker is read.

    Raises ValueError naming the directory if it is incomplete or the file has another size.
    """
    directory = weights.parent
    marker = directory / MARKER
    if not marker.exists() or not weights.exists():
        raise ValueError(f"checkpoint {directory}: incomplete, expected {WEIGHTS} and {MARKER}")
    try:
        recorded = json.loads(marker.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint {directory}: {MARKER} is corrupt ({error})") from error
    if not isinstance(recorded, dict) or recorded.keys() != {"bytes", "xxh3_128"}:
        raise ValueError(f"checkpoint {directory}: {MARKER} is corrupt, expected bytes and xxh3_128, hashes of tensors")
    if weights.stat().st_size != recorded["bytes"]:
        raise ValueError(f"checkpoint {directory}: {WEIGHTS} is corrupt (its size differs from {MARKER})")
    return recorded["xxh3_128"]


def check_checkpoint(directory: Path) -> Path:
    """Return the weights file of a complete checkpoint.

    Raises ValueError naming the directory if it is incomplete or the weights have changed since they were written.
    """
    weights = directory / WEIGHTS
    recorded = recorded_hashes(weights)
    try:
        found = file_hashes(weights)
    except ValueError as error:
        raise ValueError(f"checkpoint {directory}: {WEIGHTS} is corrupt ({error})") from error
    if found != recorded:
        names = sorted(name for name in found.keys() | recorded.keys() if found.get(name) != recorded.get(name))
        raise ValueError(
            f"checkpoint {directory}: {WEIGHTS} is corrupt (the hashes of {len(names)} tensors differ from {MARKER}, "
            f"among them that of {names[0]})"
        )
    return weights


@torch.no_grad()
def load_weights_into(
    model: torch.nn.Module, directories: Iterable[Path], ignored: Callable[[str], bool] = lambda name: False
) -> None:
    """Copy weight sets into a model, in order, without the tensors whose name is ``ignored``.

    Raises ValueError for a tensor that the model does not have, or has in another shape.
    """
    own = model.state_dict()
    for directory in directories:
        path = check_checkpoint(directory)
        with safe_open(path, framework="pt") as file:
            for name in filterfalse(ignored, file.keys()):
                tensor = file.get_tensor(name)
                if name not in own or own[name].shape != tensor.shape:
                    expected = tuple(own[name].shape) if name in own else "no such tensor"
                    raise ValueError(f"{path}: tensor {name} of shape {tuple(tensor.shape)}, the model has {expected}")
                own[name].copy_(tensor)


def load_policy(
    policy: Policy,
    dtype: torch.dtype | str,
    kind: type[Unified] | None = None,
    dropout: bool = False,
    device: str = "cpu",
) -> Unified:
    """Load a policy's model, as its family's class or as ``kind``, with the weight sets applied.

    An adapter stays beside the weights; with ``dropout``, its own is in force in training mode. Parts that it wants in
    4 bits are quantised on ``device`` and stay there.
    """
    kind = kind or family_of(load_config(policy.model)).model
    model = kind.from_pretrained(policy.model, dtype=dtype)
    if policy.adapter is not None:
        quantise(model, policy.adapter.four_bit, device)
        attach(model, policy.adapter, dropout)
    load_weights_into(model, policy.weights)
    return model


def load_fused(policy: Policy, dtype: torch.dtype | str) -> Unified:
    """Load a policy's model with its adapter, if it has one, put into the weights, all of them in ``dtype``."""
    whole = policy.adapter and replace(policy.adapter, four_bit=[])
    model = load_policy(replace(policy, adapter=whole), dtype)
    if policy.adapter is not None:
        fuse(model)
    return model
