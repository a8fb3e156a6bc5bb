"""Text accuracy: does an image show the text that its prompt asks for in quotes? Needs the extra ``rewards``.

RapidOCR reads the text; its package includes its weights.
"""

import re
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import numpy as np
from PIL import Image

if not (find_spec("rapidocr") and find_spec("onnxruntime")):
    raise ValueError("rewards.ocr needs the extra 'rewards': pip install 'vargpt-rl[rewards]'")

# A single quote with a letter on its outer side is an apostrophe.
QUOTED = re.compile(r"\"([^\"]+)\"|“([^”]+)”|«([^»]+)»|‘(.+?)’(?!\w)|(?<!\w)'(.+?)'(?!\w)")


class TextAccuracy:
    """1 - d / n: d is the edit distance between the text read and the text requested, n the length of the longer.

    1 is an exact match, 0 another text or none; extra text lowers the score. Case and spaces are ignored. A prompt
    without quoted text is not scored; several quoted texts are joined in order.
    """

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
        return [self._score(image, asked_text(prompt)) for image, prompt in zip(images, prompts, strict=True)]

    def _score(self, image: Image.Image, asked: str) -> float | None:
        return accuracy(asked, read_text(image)) if asked else None


def asked_text(prompt: str) -> str:
    """The prompt's quoted texts, joined by spaces; empty if there are none."""
    return " ".join(filter(None, (text for groups in QUOTED.findall(prompt) for text in groups)))


def read_text(image: Image.Image) -> str:
    """The text in the image, line by line from the top, joined by spaces."""
    return " ".join(_reader()(np.asarray(image.convert("RGB"))[..., ::-1]).txts or ())


def accuracy(asked: str, read: str) -> float:
    """1 - edit distance / length of the longer text, ignoring case and spaces."""
    asked, read = ("".join(text.casefold().split()) for text in (asked, read))
    longer = max(len(asked), len(read))
    return 1 - edit_distance(asked, read) / longer if longer else 1.0


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: the fewest letters to insert, delete or replace."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row = row, [i]
        for j, b in enumerate(second):
            row.append(min(above[j + 1] + 1, row[j] + 1, above[j] + (a != b)))
    return row[-1]


@cache
def _reader():
    from rapidocr import RapidOCR  # takes a second to import

    return RapidOCR(params={"Global.log_level": "error"})
