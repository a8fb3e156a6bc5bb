"""Likeness to the image that a caption belongs to, for data in which each caption has one.

    reward.path=rewards.reference:ReferenceLikeness +reward.options.captions=FILE.jsonl +reward.options.images=DIR

It needs no weights and runs anywhere. It asks for that one image: of two images that show the caption equally well it
prefers the one that looks like the reference.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from vargpt_rl.data.images import read_image

SIDE = 32
"""Pixels a side at which images are compared."""
OBJECT = 24.0
"""Mean distance of the channels from white, in 8-bit steps, above which a pixel belongs to the object."""
FAR = 128.0
"""Root mean square difference, in 8-bit steps, at which two images are no more alike in colour."""


class ReferenceLikeness:
    """Mean of likeness in colour and in shape to the caption's image, in [0, 1]; None for a caption without one.

    ``captions`` is a JSON lines file of ``caption`` and ``file``, an image in the folder ``images``. Of equal captions
    the first counts. ValueError if the file lacks a column or is unreadable, or, while scoring, if an image is.
    """

    def __init__(self, captions: str, images: str):
        rows = pd.read_json(captions, lines=True, dtype=False)
        if missing := {"caption", "file"} - set(rows.columns):
            raise ValueError(f"{captions}: no {sorted(missing)}, expected lines with caption and file")
        self.root = Path(images).resolve()
        self.files = dict(zip(rows["caption"][::-1], rows["file"][::-1], strict=True))

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
        return [
            likeness(image, _small(self._path(prompt))) if prompt in self.files else None
            for image, prompt in zip(images, prompts, strict=True)
        ]

    def _path(self, prompt: str) -> Path:
        path = (self.root / self.files[prompt]).resolve()
        if not path.is_relative_to(self.root):
            raise ValueError(f"{self.files[prompt]}: outside {self.root}")
        return path


def likeness(image: Image.Image, reference: Image.Image) -> float:
    """Mean of likeness in colour (1 at no difference, 0 from `FAR` on) and in shape (intersection over union)."""
    pixels, expected = _pixels(image), _pixels(reference)
    colour = max(0.0, 1 - float(np.sqrt(np.mean((pixels - expected) ** 2))) / FAR)
    inside, inside_expected = _object(pixels), _object(expected)
    union = int((inside | inside_expected).sum())
    shape = int((inside & inside_expected).sum()) / union if union else 1.0
    return (colour + shape) / 2


@lru_cache(maxsize=4096)
def _small(path: Path) -> Image.Image:
    return read_image(path).resize((SIDE, SIDE), Image.Resampling.BOX)


def _pixels(image: Image.Image) -> np.ndarray:
    """Return an image as float64 [SIDE, SIDE, 3], 0 to 255."""
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), np.float64)


def _object(pixels: np.ndarray) -> np.ndarray:
    return (255 - pixels).mean(-1) > OBJECT
