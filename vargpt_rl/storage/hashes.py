"""Hashes of weight sets: xxh3-128 of each tensor, and of a whole set from the hashes of its tensors.

A tensor is hashed once, when its set is written; whoever loads the set compares its own tensors with that. The hashes
detect damage and mistakes. They are not signatures: xxh3 is fast, not cryptographic.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open

STAGED = 64 << 20
"""Bytes copied from a GPU at once, into pinned memory; into other memory an H200 copied 1.2 GB/s."""


def tensor_hash(name: str, tensor: torch.Tensor) -> str:
    """Hexadecimal xxh3-128 of a tensor's name, dtype, shape and bytes."""
    own = tensor.detach().contiguous()
    digest = xxhash.xxh3_128(f"{name} {own.dtype} {tuple(own.shape)}\n".encode())
    for part in _parts_in_memory(own.reshape(-1).view(torch.uint8)):
        digest.update(part.numpy().data)
    return digest.hexdigest()


def _parts_in_memory(bytes_N: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a tensor's bytes in order; from a GPU, part by part in one buffer, which the next part overwrites."""
    if bytes_N.device.type == "cpu":
        yield bytes_N
        return
    buffer = torch.empty(min(STAGED, len(bytes_N)), dtype=torch.uint8, pin_memory=True)
    for part in bytes_N.split(STAGED):
        yield buffer[: len(part)].copy_(part)


def file_hashes(path: Path) -> dict[str, str]:
    """Hash of each tensor of a safetensors file, which is mapped into memory.

    ValueError for a file that is not whole.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tensor_hash(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error


def set_checksum(hashes: Mapping[str, str]) -> str:
    """Hexadecimal xxh3-128 of a set, from the hashes of its tensors by name; their order does not matter."""
    return xxhash.xxh3_128("".join(hashes[name] for name in sorted(hashes)).encode()).hexdigest()
