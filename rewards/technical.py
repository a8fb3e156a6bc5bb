"""Rewards of technical quality, independent of the prompt."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

# Usual threshold between blurred and sharp: a variance, in squared 8-bit steps.
BORDER = 100.0


def sharpness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
    """v / (v + 100), in [0, 1), v being the variance of the Laplacian (4 neighbours) of the luminance (0 to 255).

    Values depend on the resolution: compare images of one size. Prompts are ignored. ValueError if the lengths differ
    or an image is smaller than 3 x 3.
    """
    return [_sharpness(_luminance(image, 3)) for image, _ in zip(images, prompts, strict=True)]


def block_free(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
    """Absence of JPEG blocking, in (0, 1]: (steps inside blocks + 1) / (steps across borders + 1), at most 1.

    Steps are mean differences in luminance (0 to 255) between neighbours, inside blocks of 8 x 8 from the upper left
    corner or across their borders. Prompts are ignored. ValueError if the lengths differ or an image is smaller than
    16 x 16.
    """
    return [_block_free(_luminance(image, 16)) for image, _ in zip(images, prompts, strict=True)]


def _luminance(image: Image.Image, least: int) -> np.ndarray:
    if min(image.size) < least:
        raise ValueError(f"expected an image of at least {least} x {least} pixels, got {image.width} x {image.height}")
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
