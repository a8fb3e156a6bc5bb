"""Language-model states of images, stored for preference training that changes nothing that feeds the language model.

The states are then constants: the workers compute them while they score an image, in one safetensors file for each, and
learners read them and hold no language model. A file has ``states`` [T, H], of the prompt and of the image's tokens; it
is named after prompt, reply and tokens, and has the hash of its tensor (xxh3-128) in its metadata.

Shape legend: B rows, T positions, H language-model width.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vargpt_rl.storage.files import atomic_file
from vargpt_rl.storage.hashes import tensor_hash

NAME = "states"
HASH = "xxh3"
"""Key of the hash in a file's metadata."""

Drawn = tuple[str, str, bytes]
"""Prompt, reply, and packed tokens of an image."""


def states_path(folder: Path, drawn: Drawn) -> Path:
    """Return the file of an image's states."""
    prompt, reply, bits = drawn
    digest = hashlib.blake2b(json.dumps([prompt, reply]).encode() + bits, digest_size=16).hexdigest()
    return folder / f"{digest}.safetensors"


def write_states(folder: Path, drawn: Drawn, states_TH: torch.Tensor) -> None:
    """Write an image's states atomically."""
    own = states_TH.detach().to("cpu").contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(states_path(folder, drawn)) as unfinished:
        save_file({NAME: own}, unfinished, metadata={HASH: tensor_hash(NAME, own)})


def read_states(folder: Path, drawn: Drawn) -> torch.Tensor:
    """Read an image's states [T, H]. ValueError, naming the file, if it is missing or not as it was written."""
    path = states_path(folder, drawn)
    try:
        with safe_open(path, framework="pt") as file:
            states_TH = file.get_tensor(NAME)
            written = (file.metadata() or {}).get(HASH)
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is missing: expected the states of an image of {drawn[0]!r}; workers and learners must share the "
            "run directory"
        ) from error
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error
    if (found := tensor_hash(NAME, states_TH)) != written:
        raise ValueError(f"{path} is damaged: its states have hash {found}, expected {written}")
    return states_TH


def padded_states(folder: Path, images: Sequence[Drawn], length: int) -> torch.Tensor:
    """Read the states of images, padded with zeros or cut to ``length`` positions: [B, length, H]."""
    rows = [read_states(folder, drawn)[:length] for drawn in images]
    padded_BTH = rows[0].new_zeros(len(rows), length, rows[0].shape[1])
    for row_TH, states_TH in zip(padded_BTH, rows, strict=True):
        row_TH[: len(states_TH)] = states_TH
    return padded_BTH
