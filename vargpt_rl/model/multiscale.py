"""Multi-scale residual quantisation: a latent map as a sum of codes, coarse to fine.

Each scale encodes the remainder of the coarser scales. A family of the model defines its labels (``Symbols``), how a
remainder becomes labels, how labels become a map, and how the running sum becomes the next scale's inputs.

Shape legend: B batch, L image tokens, s symbols a token, d latent channels, h w latent grid, n tokens of one scale.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch

from vargpt_rl.model.scales import Schedule, scale_slices, token_count


class Symbols(NamedTuple):
    """Format of an image token: ``depth`` symbols of ``values`` possible values each.

    32 bits in v1.1 (32, 2), one index of a codebook in v1 (1, 4096). Labels are integers [..., depth], logits
    [..., depth * values] with the values of a symbol side by side.
    """

    depth: int
    values: int

    @property
    def bits(self) -> int:
        """Bits of a token."""
        return self.depth * (self.values - 1).bit_length()

    @property
    def name(self) -> str:
        """Name of one symbol, "bit" or "index"."""
        return "bit" if self.values == 2 else "index"

    @classmethod
    def of(cls, logits: torch.Tensor, labels: torch.Tensor) -> "Symbols":
        """Infer the format from the shapes of logits and labels."""
        return cls(labels.shape[-1], logits.shape[-1] // labels.shape[-1])


class Quantised(NamedTuple):
    """Images as labels, and what follows from these."""

    labels_BLs: torch.Tensor
    """Integers."""
    inputs_BLd: torch.Tensor
    """Decoder inputs of scales 1 to K - 1 (L - 1 tokens)."""
    summed_Bdhw: torch.Tensor
    """Sum of the codes: the input of the VAE decoder."""


def to_map(tokens_Bnd: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Arrange tokens on their grid: [B, d, *grid]."""
    return tokens_Bnd.transpose(1, 2).unflatten(2, grid)


def to_tokens(map_Bdhw: torch.Tensor) -> torch.Tensor:
    """Flatten a map into tokens: [B, h * w, d]."""
    return map_Bdhw.flatten(2).transpose(1, 2)


class MultiScale(ABC):
    """Quantiser: the schedule and three steps that a family defines, and the loops over scales built on them."""

    @abstractmethod
    def schedule_for(self, height: int, width: int | None = None) -> Schedule:
        """Return the grids of an image of ``height`` x ``width`` pixels (square if width is omitted).

        Raises ValueError for a size that the family does not draw.
        """

    @abstractmethod
    def label(self, features_Bdhw: torch.Tensor, summed_Bdhw: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Quantise the remainder of the features on one grid: integers [B, n, s]."""

    @abstractmethod
    def addend(self, labels_Bns: torch.Tensor, schedule: Schedule, k: int, dtype: torch.dtype) -> torch.Tensor:
        """Return what scale ``k`` adds to the sum: [B, d, h, w]."""

    @abstractmethod
    def inputs(self, summed_Bdhw: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Turn the sum so far into decoder inputs on the next scale's grid: [B, n, d]."""

    def training_state(self) -> dict[str, torch.Tensor]:
        """Return what training keeps beside the weights."""
        return {}

    def load_training_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `training_state` returned."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps nothing beside its weights, got {sorted(state)}")

    def quantise(
        self,
        features_Bdhw: torch.Tensor,
        schedule: Schedule,
        feed: Callable[[torch.Tensor], torch.Tensor] = lambda labels_Bns: labels_Bns,
    ) -> Quantised:
        """Encode features scale by scale.

        ``feed`` maps the labels of a scale to those that finer scales build on.
        """
        last = schedule[-1]
        if features_Bdhw.shape[-2:] != torch.Size(last):
            raise ValueError(f"features have grid {tuple(features_Bdhw.shape[-2:])}, but the schedule ends at {last}")
        summed = torch.zeros_like(features_Bdhw)
        labels, inputs = [], []
        for k, grid in enumerate(schedule):
            labels.append(self.label(features_Bdhw, summed, grid))
            summed = summed + self.addend(feed(labels[-1]), schedule, k, summed.dtype)
            if k + 1 < len(schedule):
                inputs.append(self.inputs(summed, schedule[k + 1]))
        return Quantised(torch.cat(labels, 1), _joined(inputs, summed), summed)

    def quantise_noisily(self, features_Bdhw: torch.Tensor, schedule: Schedule, flip: float) -> Quantised:
        """Encode features for training; ``flip`` bounds the bit-flip probability and matters for bits only."""
        return self.quantise(features_Bdhw, schedule)

    def replay(
        self,
        labels_BLs: torch.Tensor,
        schedule: Schedule,
        dtype: torch.dtype = torch.float32,
        scales: int | None = None,
    ) -> Quantised:
        """Recompute from stored labels exactly the inputs and the latent sum that drawing them produced.

        With ``scales``, labels and results are limited to that many coarse scales of the schedule.
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
        assert summed is not None  # a schedule has at least one scale
        return Quantised(labels_BLs, _joined(inputs, summed), summed)


def _joined(inputs: list[torch.Tensor], summed_Bdhw: torch.Tensor) -> torch.Tensor:
    return torch.cat(inputs, 1) if inputs else summed_Bdhw.new_zeros(len(summed_Bdhw), 0, summed_Bdhw.shape[1])
