"""Rewards of technical quality, for any image whatever its prompt."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

# The variance, in squared 8-bit steps, that is customarily taken as the border between blurred and sharp.
BORDER = 100.0


def sharpness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
    """v / (v + 100), in [0, 1), v being the variance of the Laplacian (4 neighbours) of the luminance (0 to 255).

    Values depend on the resolution: compare images of one size. The prompts are not read. Raises ValueError where
    the lengths differ or an image is smaller than 3 x 3.
    """
    return [_sharpness(_luminance(image, 3)) for image, _ in zip(images, prompts, strict=True)]


def block_free(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
    """1 where no grid of JPEG blocks is seen, towards 0 the more it is: (steps inside + 1) / (steps at borders + 1).

    A step is the mean difference in luminance (0 to 255) of two neighbours, within blocks of 8 x 8 from the upper left
    corner or across their borders; 1 is the most that is given. The prompts are not read. Raises ValueError where the
    lengths differ or an image is smaller than 16 x 16.
    """
    return [_block_free(_luminance(image, 16)) for image, _ in zip(images, prompts, strict=True)]


def _luminance(image: Image.Image, least: int) -> np.ndarray:
    if min(image.size) < least:
        raise ValueError(f"expected an image of {least} x {least} pixels or more, got {image.width} x {image.height}")
    return np.asarray(image.convert("RGB").convert("L"), np.float64)


def _block_free(y: np.ndarray) -> float:
    across, down = np.abs(np.diff(y, axis=1)), np.abs(np.diff(y, axis=0)).T
    at_border = [steps[:, 7::8] for steps in (across, down)]
    inside = [np.delete(steps, np.s_[7::8], axis=1) for steps in (across, down)]
    border, within = (float(np.mean([part.mean() for part in parts])) for parts in (at_border, inside))
    return min(1.0, (within + 1) / (border + 1))


def _sharpness(y: np.ndarray) -> float:
    laplacian = y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:] - 4 * y[1:-1, 1:-1]
    variance = float(laplacian.var())
    return variance / (variance + BORDER)
