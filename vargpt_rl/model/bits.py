"""Multi-scale binary spherical quantisation: converts latent features to bits, and bits to decoder inputs.

Each scale encodes the sign of the remainder of the coarser scales (Infinity, section 3.2). Nothing here needs weights,
so a learner can recompute every decoder input from the bits alone.

Shape legend: B batch, L image tokens, n tokens of one scale, d bits or s symbols a token, h w latent grid, K scales.
"""

import numpy as np
import torch
import torch.nn.functional as F

from vargpt_rl.model.multiscale import MultiScale, Quantised, to_map, to_tokens
from vargpt_rl.model.scales import Schedule, schedule_for


def to_codes(bits_BLd: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Map bits {0, 1} to points {-1, +1} / sqrt(d) on the unit sphere."""
    return (bits_BLd.to(dtype) * 2 - 1) / bits_BLd.shape[-1] ** 0.5


def resize(map_Bdhw: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Interpolate bilinearly without antialiasing, up or down, as the model was trained."""
    if map_Bdhw.shape[-2:] == torch.Size(grid):
        return map_Bdhw
    return F.interpolate(map_Bdhw, size=grid, mode="bilinear", align_corners=False)


def residual(features_Bdhw: torch.Tensor, summed_Bdhw: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Return the unit-length remainder of the features at one scale, [B, d, *grid]."""
    rest = features_Bdhw - summed_Bdhw
    if rest.shape[-2:] != torch.Size(grid):
        rest = F.interpolate(rest, size=grid, mode="area")
    return F.normalize(rest, dim=1)


class Bits(MultiScale):
    """Quantiser whose labels are the signs of the remainder (specification, section 2)."""

    schedule_for = staticmethod(schedule_for)

    def label(self, features_Bdhw, summed_Bdhw, grid):
        return (to_tokens(residual(features_Bdhw, summed_Bdhw, grid)) > 0).to(torch.uint8)

    def addend(self, labels_Bns, schedule, k, dtype):
        return resize(to_map(to_codes(labels_Bns, dtype), schedule[k]), schedule[-1])

    def inputs(self, summed_Bdhw, grid):
        return to_tokens(resize(summed_Bdhw, grid))

    def quantise_noisily(self, features_Bdhw, schedule, flip):
        """Encode features with the bit flips of bitwise self-correction (see `quantise_flipped`).

        Each image and scale draws its flip probability uniformly from [0, ``flip``).
        """
        if not flip:
            return self.quantise(features_Bdhw, schedule)
        rates_BK = torch.rand(len(features_Bdhw), len(schedule), device=features_Bdhw.device) * flip
        return self.quantise_flipped(features_Bdhw, schedule, rates_BK)

    def quantise_flipped(
        self,
        features_Bdhw: torch.Tensor,
        schedule: Schedule,
        flip_BK: torch.Tensor,
        generator: torch.Generator | None = None,
    ) -> Quantised:
        """Encode features, flipping bits before finer scales build on them (Infinity, section 3.4).

        ``flip_BK`` is the flip probability per image and scale. Labels remain those of the true remainder, so finer
        scales learn to repair the flips.
        """
        rates = iter(flip_BK.unbind(1))

        def flipped(bits_Bnd: torch.Tensor) -> torch.Tensor:
            noise = torch.rand(bits_Bnd.shape, generator=generator, device=bits_Bnd.device)
            return bits_Bnd ^ (noise < next(rates)[:, None, None]).to(torch.uint8)

        return self.quantise(features_Bdhw, schedule, flipped)


def _width(values: int) -> int:
    return (values - 1).bit_length()


def pack(labels_Ls: np.ndarray, values: int = 2) -> bytes:
    """Pack integers below ``values`` [L, s] into bytes, with the minimum number of bits each, highest bit first.

    An image at 256 px takes 2.1 kB with 32 bits per token, 1.0 kB with one of 4096 indices per token.
    """
    shifts = np.arange(_width(values))[::-1].astype(labels_Ls.dtype)
    return np.packbits((labels_Ls[..., None] >> shifts & 1).astype(np.uint8), axis=None).tobytes()


def unpack(packed: bytes, tokens: int, depth: int, values: int = 2) -> np.ndarray:
    """Invert ``pack``: uint8 [L, s], or int32 if ``values`` do not fit.

    Raises ValueError if the length is not that of ``tokens * depth`` labels, or a label is not below ``values``.
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
        raise ValueError(f"packed bits: found label {labels.max()}, expected less than {values}")
    return labels.astype(np.uint8 if values <= 256 else np.int32)
