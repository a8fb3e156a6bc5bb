"""Multi-scale residual quantisation: a latent map as a sum of coarse-to-fine codes, whatever a code is.

Each scale encodes what the coarser scales left over. A family of the model says what its labels are (``Symbols``), how
a remainder becomes labels, labels a map, and the sum so far the inputs of the next scale; the rest is here.

Shape legend: B batch, L image tokens, s symbols a token, d latent channels, h w latent grid, n tokens of one scale.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from vargpt_rl.model.scales import Schedule, scale_slices, token_count


class Symbols(NamedTuple):
    """What a token is: ``depth`` symbols of ``values`` possible values each.

    32 bits in v1.1 (32, 2), one index of a codebook in v1 (1, 4096). Labels are integers [..., depth], logits
    [..., depth * values] with the values of a symbol side by side.
    """

    depth: int
    values: int

    @property
    def name(self) -> str:
        """What one symbol is called."""
        return "bit" if self.values == 2 else "index"

    @classmethod
    def of(cls, logits: torch.Tensor, labels: torch.Tensor) -> "Symbols":
        """Of a pair of logits and labels, by their shapes."""
        return cls(labels.shape[-1], logits.shape[-1] // labels.shape[-1])


class Quantised(NamedTuple):
    """``labels_BLs`` integers, ``inputs_BLd`` of scales 1..K-1 (L-1 tokens), ``summed_Bdhw`` for the VAE decoder."""

    labels_BLs: torch.Tensor
    inputs_BLd: torch.Tensor
    summed_Bdhw: torch.Tensor

    @property
    def bits_BLd(self) -> torch.Tensor:
        """The labels where they are bits: uint8 [B, L, d]."""
        return self.labels_BLs


def to_map(tokens_Bnd: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    return tokens_Bnd.transpose(1, 2).unflatten(2, grid)


def to_tokens(map_Bdhw: torch.Tensor) -> torch.Tensor:
    return map_Bdhw.flatten(2).transpose(1, 2)


class MultiScale:
    """The schedule and the three steps that a family defines, and the loops over scales that follow from them."""

    def schedule_for(self, height: int, width: int | None = None) -> Schedule:
        """The grids of an image of ``height`` x ``width`` pixels (square when width is left out).

        Raises ValueError for a size that the family does not draw.
        """
        raise NotImplementedError

    def label(self, features_Bdhw: torch.Tensor, summed_Bdhw: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Integers [B, n, s]: what the sum so far lacks, rounded on one grid."""
        raise NotImplementedError

    def addend(self, labels_Bns: torch.Tensor, schedule: Schedule, k: int, dtype: torch.dtype) -> torch.Tensor:
        """[B, d, h, w]: what scale ``k`` adds to the sum."""
        raise NotImplementedError

    def inputs(self, summed_Bdhw: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """[B, n, d]: the sum so far as inputs of the tokens of the next scale."""
        raise NotImplementedError

    def quantise(
        self,
        features_Bdhw: torch.Tensor,
        schedule: Schedule,
        feed: Callable[[torch.Tensor], torch.Tensor] = lambda labels_Bns: labels_Bns,
    ) -> Quantised:
        """Encode features scale by scale; ``feed`` makes of each scale's labels those that are fed on."""
        last = schedule[-1]
        if features_Bdhw.shape[-2:] != torch.Size(last):
            raise ValueError(f"features of grid {tuple(features_Bdhw.shape[-2:])}, but the schedule ends at {last}")
        summed = torch.zeros_like(features_Bdhw)
        labels, inputs = [], []
        for k, grid in enumerate(schedule):
            labels.append(self.label(features_Bdhw, summed, grid))
            summed = summed + self.addend(feed(labels[-1]), schedule, k, summed.dtype)
            if k + 1 < len(schedule):
                inputs.append(self.inputs(summed, schedule[k + 1]))
        return Quantised(torch.cat(labels, 1), _joined(inputs, summed), summed)

    def replay(
        self,
        labels_BLs: torch.Tensor,
        schedule: Schedule,
        dtype: torch.dtype = torch.float32,
        scales: int | None = None,
    ) -> Quantised:
        """From stored labels, the very inputs and the latent sum that drawing them produced.

        With ``scales``, the labels are those of that many coarse scales of the schedule, and so are the results.
        """
        found, expected = labels_BLs.shape[1], token_count(schedule[:scales])
        if found != expected:
            raise ValueError(f"{found} image tokens, but the schedule {schedule[:scales]} has {expected}")
        summed, inputs = None, []
        for k, at in enumerate(scale_slices(schedule[:scales])):
            added = self.addend(labels_BLs[:, at], schedule, k, dtype)
            summed = added if summed is None else summed + added
            if k + 1 < len(schedule[:scales]):
                inputs.append(self.inputs(summed, schedule[k + 1]))
        return Quantised(labels_BLs, _joined(inputs, summed), summed)


def _joined(inputs: list[torch.Tensor], summed_Bdhw: torch.Tensor) -> torch.Tensor:
    return torch.cat(inputs, 1) if inputs else summed_Bdhw.new_zeros(len(summed_Bdhw), 0, summed_Bdhw.shape[1])
