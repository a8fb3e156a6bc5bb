"""Scale schedules: the token grids on which an image of a given size is drawn, from 1x1 to the full latent grid.

An image of H x W pixels has a latent grid of H/16 x W/16. Next-scale prediction draws it as a sequence of growing
grids. The release uses hand-made sequences for fifteen aspect ratios (Infinity, supplementary; h/w from 3 to 1/3),
each cut after 7 (about 256x256 px), 10 (512x512), 12 (768x768) or 13 (1024x1024) grids. A size outside that table
gets the grids of the nearest aspect ratio that are smaller than its own grid, then its own grid.
"""

from functools import lru_cache

import torch

STRIDE = 16
"""Side in pixels of one token of the last grid."""

Schedule = tuple[tuple[int, int], ...]
"""(height, width) of each token grid, coarse to fine."""

_TALL: dict[float, str] = {
    1.000: "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    1.250: "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.500: "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.750: "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.000: "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.500: "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.000: "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}


def _grids(text: str) -> Schedule:
    return tuple((int(h), int(w)) for h, w in (grid.split("x") for grid in text.split()))


def _table() -> dict[float, Schedule]:
    table = {}
    for ratio, text in _TALL.items():
        table[ratio] = _grids(text)
        table[1 / ratio] = tuple((w, h) for h, w in _grids(text))
    return table


SCHEDULES: dict[float, Schedule] = _table()
"""Aspect ratio (height over width) to the release's thirteen grids at one megapixel."""


def full_schedule(height: float, width: float) -> Schedule:
    """Return the thirteen grids of the aspect ratio nearest to ``height / width`` (any unit)."""
    ratio = height / width
    return SCHEDULES[min(SCHEDULES, key=lambda known: abs(known - ratio))]


@lru_cache
def schedule_for(height: int, width: int | None = None) -> Schedule:
    """Return the schedule of an image of ``height`` x ``width`` pixels (square if width is omitted).

    Raises ValueError if a side is not a positive multiple of 16.
    """
    width = height if width is None else width
    for side in (height, width):
        if side <= 0 or side % STRIDE:
            raise ValueError(f"resolution {height}x{width}: {side} is not a positive multiple of {STRIDE}")
    last = (height // STRIDE, width // STRIDE)
    coarser = tuple(g for g in full_schedule(height, width) if g[0] <= last[0] and g[1] <= last[1] and g != last)
    return (*coarser, last)


def size_for(resolution: int, aspect: float = 1.0) -> tuple[int, int]:
    """Return the release's (height, width) in pixels nearest to ``aspect`` = width / height at this resolution.

    Raises ValueError for a resolution that is not one of the release's.
    """
    square = schedule_for(resolution)[-1]
    if square not in SCHEDULES[1.0]:
        raise ValueError(f"resolution {resolution} has no sizes at other aspect ratios; use one of the release's")
    height, width = full_schedule(1, aspect)[SCHEDULES[1.0].index(square)]
    return height * STRIDE, width * STRIDE


def token_count(schedule: Schedule) -> int:
    """Return L, the number of image tokens of a schedule."""
    return sum(h * w for h, w in schedule)


def scale_slices(schedule: Schedule) -> list[slice]:
    """Return the slice of each scale among the L image tokens."""
    slices = []
    start = 0
    for h, w in schedule:
        slices.append(slice(start, start + h * w))
        start += h * w
    return slices


def scales_within(schedule: Schedule, tokens: slice) -> list[slice]:
    """Return the slices of the scales that ``tokens``, a slice of the L image tokens, consists of."""
    start, stop, _ = tokens.indices(token_count(schedule))
    return [at for at in scale_slices(schedule) if start <= at.start and at.stop <= stop]


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # a table cached while sampling must also work in training
def scale_index(schedule: Schedule, device: torch.device | None = None) -> torch.Tensor:
    """Return the scale of each image token: int64 [L]. It is made once; do not write to it."""
    sizes = torch.tensor([h * w for h, w in schedule], device="cpu")
    return torch.repeat_interleave(torch.arange(len(schedule), device="cpu"), sizes).to(device)


def grid_positions(schedule: Schedule) -> torch.Tensor:
    """Return row and column of each token on the one-megapixel grid of its aspect ratio: int64 [L, 2].

    Every scale is stretched over the same reference grid, so a coordinate means the same place at every scale and
    resolution. Rounding is half to even, as the release does (specification, section 4, step 8).
    """
    rows, cols = full_schedule(*schedule[-1])[-1]
    positions = []
    for h, w in schedule:
        y = torch.round(torch.arange(h, dtype=torch.float64) * (rows / h))
        x = torch.round(torch.arange(w, dtype=torch.float64) * (cols / w))
        positions.append(torch.cartesian_prod(y, x) if h * w > 1 else torch.zeros(1, 2, dtype=torch.float64))
    return torch.cat(positions).long()
