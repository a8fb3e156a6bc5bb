"""Multi-scale binary spherical quantisation: between latent features, bits and the inputs of the next scale.

Each scale encodes the sign of what the coarser scales left over (Infinity, section 3.2). All functions are pure and
need no weights, so a learner that knows only bits can rebuild every input the decoder saw.

Shape legend: B batch, L image tokens, d bits a token, h w latent grid, K scales.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from vargpt_rl.model.scales import Schedule, scale_slices, token_count


class Quantised(NamedTuple):
    """``bits_BLd`` uint8 labels, ``inputs_BLd`` of scales 1..K-1 (L-1 tokens), ``summed_Bdhw`` for the VAE decoder."""

    bits_BLd: torch.Tensor
    inputs_BLd: torch.Tensor
    summed_Bdhw: torch.Tensor


def to_codes(bits_BLd: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Bits {0, 1} -> points {-1, +1} / sqrt(d) on the unit sphere."""
    return (bits_BLd.to(dtype) * 2 - 1) / bits_BLd.shape[-1] ** 0.5


def to_map(tokens_Bnd: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    return tokens_Bnd.transpose(1, 2).unflatten(2, grid)


def to_tokens(map_Bdhw: torch.Tensor) -> torch.Tensor:
    return map_Bdhw.flatten(2).transpose(1, 2)


def resize(map_Bdhw: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Linear interpolation without antialiasing, as the model was trained with, also where it shrinks."""
    if map_Bdhw.shape[-2:] == torch.Size(grid):
        return map_Bdhw
    return F.interpolate(map_Bdhw, size=grid, mode="bilinear", align_corners=False)


def residual(features_Bdhw: torch.Tensor, summed_Bdhw: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Unit-length remainder of the features at one scale, [B, d, *grid]."""
    rest = features_Bdhw - summed_Bdhw
    if rest.shape[-2:] != torch.Size(grid):
        rest = F.interpolate(rest, size=grid, mode="area")
    return F.normalize(rest, dim=1)


def quantise(
    features_Bdhw: torch.Tensor, schedule: Schedule, flip_B: torch.Tensor | None = None, generator=None
) -> Quantised:
    """Encode features as bits, scale by scale (specification, section 2).

    ``flip_B``: per picture, the probability that a bit is flipped before it is fed on (bitwise self-correction,
    Infinity section 3.4). Labels stay those of the true remainder, so later scales learn to repair the flips.
    """
    last = schedule[-1]
    if features_Bdhw.shape[-2:] != torch.Size(last):
        raise ValueError(f"features of grid {tuple(features_Bdhw.shape[-2:])}, but the schedule ends at {last}")
    summed = torch.zeros_like(features_Bdhw)
    bits, inputs = [], []
    for k, grid in enumerate(schedule):
        label_Bnd = (to_tokens(residual(features_Bdhw, summed, grid)) > 0).to(torch.uint8)
        bits.append(label_Bnd)
        fed_Bnd = label_Bnd
        if flip_B is not None:
            noise = torch.rand(label_Bnd.shape, generator=generator, device=label_Bnd.device)
            fed_Bnd = label_Bnd ^ (noise < flip_B[:, None, None]).to(torch.uint8)
        summed = summed + resize(to_map(to_codes(fed_Bnd, features_Bdhw.dtype), grid), last)
        if k + 1 < len(schedule):
            inputs.append(to_tokens(resize(summed, schedule[k + 1])))
    inputs_BLd = torch.cat(inputs, 1) if inputs else summed.new_zeros(len(summed), 0, summed.shape[1])
    return Quantised(torch.cat(bits, 1), inputs_BLd, summed)


def replay(bits_BLd: torch.Tensor, schedule: Schedule, dtype: torch.dtype = torch.float32) -> Quantised:
    """From stored bits, the very inputs and the latent sum that drawing them produced."""
    if bits_BLd.shape[1] != token_count(schedule):
        raise ValueError(f"{bits_BLd.shape[1]} image tokens, but the schedule {schedule} has {token_count(schedule)}")
    last = schedule[-1]
    summed = torch.zeros(len(bits_BLd), bits_BLd.shape[2], *last, dtype=dtype, device=bits_BLd.device)
    inputs = []
    for k, (grid, at) in enumerate(zip(schedule, scale_slices(schedule), strict=True)):
        summed = summed + resize(to_map(to_codes(bits_BLd[:, at], dtype), grid), last)
        if k + 1 < len(schedule):
            inputs.append(to_tokens(resize(summed, schedule[k + 1])))
    inputs_BLd = torch.cat(inputs, 1) if inputs else summed.new_zeros(len(bits_BLd), 0, bits_BLd.shape[2])
    return Quantised(bits_BLd, inputs_BLd, summed)


def pack(bits_Ld: np.ndarray) -> bytes:
    """Bits uint8 [L, d] -> bytes, eight bits each (2.1 kB for a picture at 256 px and d = 32)."""
    return np.packbits(bits_Ld.astype(bool), axis=None).tobytes()


def unpack(packed: bytes, tokens: int, depth: int) -> np.ndarray:
    """Inverse of ``pack``: uint8 [L, d]. ValueError if the length is not that of ``tokens * depth`` bits."""
    expected = (tokens * depth + 7) // 8
    if len(packed) != expected:
        raise ValueError(f"packed bits: {len(packed)} bytes, expected {expected} for {tokens} tokens of {depth} bits")
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=tokens * depth).reshape(tokens, depth)
