"""The exact checker of the shapes world as a reward."""

from collections.abc import Sequence

from PIL import Image

from vargpt_rl.data import shapes
from vargpt_rl.data.shapes_check import check


def shapes_reward(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
    """1.0 for an image that shows what its prompt asks for, 0.0 for others, None for a prompt of another kind.

    ValueError if the lengths differ or an image is not square.
    """
    return [
        float(check(image, prompt).correct) if _is_caption(prompt) else None
        for image, prompt in zip(images, prompts, strict=True)
    ]


def _is_caption(prompt: str) -> bool:
    try:
        shapes.parse(prompt)
    except ValueError:
        return False
    return True
