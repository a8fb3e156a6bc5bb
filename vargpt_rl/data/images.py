"""Decoding of image files, and the square crops that are trained on."""

from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 64_000_000
KINDS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Formats that are decoded. Pillow knows more, and runs a program for one of them (PostScript)."""
WHITE = (255, 255, 255)
MARGIN = 1.125
"""Ratio of an image's resized shorter side to the crop (VARGPT-v1.1's published training)."""


class ImageSource(Protocol):
    """Images by key."""

    def load(self, key: str, side: int) -> Image.Image:
        """Load the image of ``key``: RGB, ``side`` pixels wide and high. Raises ValueError if it is unreadable."""
        ...


def read_image(file: Path | BinaryIO, max_pixels: int = MAX_PIXELS, background: tuple[int, ...] = WHITE) -> Image.Image:
    """Read an image as RGB: upright, 16 bits cut to 8, transparency laid on ``background``.

    ValueError if it is missing, unreadable or has more than ``max_pixels``.
    """
    try:
        with Image.open(file, formats=KINDS) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(f"{image.width} x {image.height} is more than {max_pixels} pixels")
            return as_rgb(ImageOps.exif_transpose(image), background)
    except Exception as error:  # Pillow's decoders raise errors of many kinds on broken files
        name = f"{file}: " if isinstance(file, Path) else ""
        raise ValueError(f"{name}not a readable image: {error}") from error


def as_rgb(image: Image.Image, background: tuple[int, ...] = WHITE) -> Image.Image:
    """Convert to RGB without transparency; 16 bits a channel are cut to 8."""
    if image.mode.startswith("I;16"):  # converting would clip everything above 255 of 65535
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image.convert("RGB")


def random_crop(image: Image.Image, resolution: int, rng: np.random.Generator) -> Image.Image:
    """Crop a random square of ``image``: RGB, ``resolution`` pixels a side.

    The shorter side is resized to ``MARGIN`` x ``resolution`` (Lanczos). Only the square itself is resampled, since a
    resized strip of 1 x 1000000 pixels would not fit in memory. Draws from ``rng`` exactly twice.
    """
    shorter = round(MARGIN * resolution)
    sides = [max(shorter, round(side * shorter / min(image.size))) for side in image.size]
    box = []
    for side, length in zip(sides, image.size, strict=True):
        first = int(rng.integers(side - resolution + 1))
        box.append((first * length / side, min(length, (first + resolution) * length / side)))
    (left, right), (top, bottom) = box
    size = (resolution, resolution)
    return as_rgb(image).resize(size, Image.Resampling.LANCZOS, box=(left, top, right, bottom))
