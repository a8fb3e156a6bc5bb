"""Rewards of technical quality, for any picture whatever its prompt."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

# The variance, in squared 8-bit steps, that is customarily taken as the border between blurred and sharp.
BORDER = 100.0


def sharpness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
    """v / (v + 100), in [0, 1), v being the variance of the Laplacian (4 neighbours) of the luminance (0 to 255).

    Values depend on the resolution: compare pictures of one size. The prompts are not read. Raises ValueError where
    the lengths differ or a picture is smaller than 3 x 3.
    """
    return [_sharpness(image) for image, _ in zip(images, prompts, strict=True)]


def _sharpness(image: Image.Image) -> float:
    if min(image.size) < 3:
        raise ValueError(f"expected a picture of 3 x 3 pixels or more, got {image.width} x {image.height}")
    y = np.asarray(image.convert("RGB").convert("L"), np.float64)
    laplacian = y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:] - 4 * y[1:-1, 1:-1]
    variance = float(laplacian.var())
    return variance / (variance + BORDER)
