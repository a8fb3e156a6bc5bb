"""Small WebP images of what a run draws, for people: made in the workers, kept in the run directory."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vargpt_rl.data.samples import Prompt
from vargpt_rl.data.sources import ImageCheck

SIDE = 256
"""Longest side of a kept image in pixels."""
QUALITY = 80


def thumbnail(image: Image.Image) -> bytes:
    """Return an image as WebP, shrunk if a side is longer than `SIDE`."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=QUALITY)
    return buffer.getvalue()


@dataclass(frozen=True)
class Illustrated:
    """Extends a check, if there is one: each verdict comes with the image's `thumbnail`. Pickled into workers.

    One pass over the images serves both, so that they are decoded once.
    """

    check: ImageCheck | None

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[tuple[Any, bytes]]:
        verdicts = self.check(images, prompts) if self.check else [None] * len(images)
        return list(zip(verdicts, map(thumbnail, images), strict=True))
