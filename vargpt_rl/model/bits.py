"""Multi-scale binary spherical quantisation: between latent features, bits and the inputs of the next scale.

Each scale encodes the sign of what the coarser scales left over (Infinity, section 3.2). All functions are pure and
need no weights, so a learner that knows only bits can rebuild every input the decoder saw.

Shape legend: B batch, L image tokens, d bits a token, h w latent grid, K scales.
"""

import numpy as np
import torch
import torch.nn.functional as F

from vargpt_rl.model.multiscale import MultiScale, Quantised, to_map, to_tokens
from vargpt_rl.model.scales import Schedule, schedule_for


def to_codes(bits_BLd: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Bits {0, 1} -> points {-1, +1} / sqrt(d) on the unit sphere."""
    return (bits_BLd.to(dtype) * 2 - 1) / bits_BLd.shape[-1] ** 0.5


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


class Bits(MultiScale):
    """Labels are the signs of the remainder (specification, section 2)."""

    schedule_for = staticmethod(schedule_for)

    def label(self, features_Bdhw, summed_Bdhw, grid):
        return (to_tokens(residual(features_Bdhw, summed_Bdhw, grid)) > 0).to(torch.uint8)

    def addend(self, labels_Bns, schedule, k, dtype):
        return resize(to_map(to_codes(labels_Bns, dtype), schedule[k]), schedule[-1])

    def inputs(self, summed_Bdhw, grid):
        return to_tokens(resize(summed_Bdhw, grid))


BITS = Bits()


def quantise(
    features_Bdhw: torch.Tensor, schedule: Schedule, flip_BK: torch.Tensor | None = None, generator=None
) -> Quantised:
    """Encode features as bits, scale by scale (specification, section 2).

    ``flip_BK``: per image and scale, the probability that a bit is flipped before it is fed on (bitwise
    self-correction, Infinity section 3.4). Labels stay those of the true remainder, so later scales learn to repair
    the flips.
    """
    if flip_BK is None:
        return BITS.quantise(features_Bdhw, schedule)
    rates = iter(flip_BK.unbind(1))

    def flipped(bits_Bnd: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(bits_Bnd.shape, generator=generator, device=bits_Bnd.device)
        return bits_Bnd ^ (noise < next(rates)[:, None, None]).to(torch.uint8)

    return BITS.quantise(features_Bdhw, schedule, flipped)


def replay(bits_BLd: torch.Tensor, schedule: Schedule, dtype: torch.dtype = torch.float32) -> Quantised:
    """From stored bits, the very inputs and the latent sum that drawing them produced."""
    return BITS.replay(bits_BLd, schedule, dtype)


def _width(values: int) -> int:
    return (values - 1).bit_length()


def pack(labels_Ls: np.ndarray, values: int = 2) -> bytes:
    """Integers below ``values`` [L, s] -> bytes, in no more bits each than needed, the highest bit first.

    An image at 256 px takes 2.1 kB as 32 bits a token, 1.0 kB as an index of 4096 a token.
    """
    shifts = np.arange(_width(values))[::-1].astype(labels_Ls.dtype)
    return np.packbits((labels_Ls[..., None] >> shifts & 1).astype(np.uint8), axis=None).tobytes()


def unpack(packed: bytes, tokens: int, depth: int, values: int = 2) -> np.ndarray:
    """Inverse of ``pack``: uint8 [L, s], or int32 where ``values`` do not fit.

    ValueError if the length is not that of ``tokens * depth`` labels, or a label is not below ``values``.
    """
    width = _width(values)
    count = tokens * depth * width
    expected = (count + 7) // 8
    if len(packed) != expected:
        what = f"{tokens} tokens of {depth} " + ("bits" if values == 2 else f"labels below {values}")
        raise ValueError(f"packed bits: {len(packed)} bytes, expected {expected} for {what}")
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=count).reshape(tokens, depth, width)
    labels = bits[..., 0] if width == 1 else bits @ (1 << np.arange(width)[::-1])
    if labels.max(initial=0) >= values:
        raise ValueError(f"packed bits: a label of {labels.max()}, expected less than {values}")
    return labels.astype(np.uint8 if values <= 256 else np.int32)
