"""Whether an image shows the text that its prompt asks for, in quotes. Needs the extra ``rewards``.

The reader is RapidOCR, whose package brings its weights along.
"""

import re
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import numpy as np
from PIL import Image

if not (find_spec("rapidocr") and find_spec("onnxruntime")):
    raise ValueError("rewards.ocr needs the extra 'rewards': pip install 'vargpt-rl[rewards]'")

# Single quotes count only where no letter is on their outer side: elsewhere they are apostrophes.
QUOTED = re.compile(r"\"([^\"]+)\"|“([^”]+)”|«([^»]+)»|‘(.+?)’(?!\w)|(?<!\w)'(.+?)'(?!\w)")


class TextAccuracy:
    """1 - d / n: d letters must change to get from the text read to the text asked for, n is the length of the longer.

    1 is exactly the text, 0 another one or none; more text than asked for counts against it. Upper and lower case and
    spaces make no difference. A prompt without a text in quotes is not scored; several texts are taken in their order.
    """

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
        return [self._score(image, asked_text(prompt)) for image, prompt in zip(images, prompts, strict=True)]

    def _score(self, image: Image.Image, asked: str) -> float | None:
        return accuracy(asked, read_text(image)) if asked else None


def asked_text(prompt: str) -> str:
    """What the prompt has in quotes, joined by spaces; empty if there is nothing."""
    return " ".join(filter(None, (text for groups in QUOTED.findall(prompt) for text in groups)))


def read_text(image: Image.Image) -> str:
    """What is written on the image, line by line from the top, joined by spaces."""
    return " ".join(_reader()(np.asarray(image.convert("RGB"))[..., ::-1]).txts or ())


def accuracy(asked: str, read: str) -> float:
    """1 - the edit distance, as a share of the longer text; without regard to case and spaces."""
    asked, read = ("".join(text.casefold().split()) for text in (asked, read))
    longer = max(len(asked), len(read))
    return 1 - edit_distance(asked, read) / longer if longer else 1.0


def edit_distance(first: str, second: str) -> int:
    """How many letters must be added, taken away or replaced to get from one text to the other."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row = row, [i]
        for j, b in enumerate(second):
            row.append(min(above[j + 1] + 1, row[j] + 1, above[j] + (a != b)))
    return row[-1]


@cache
def _reader():
    from rapidocr import RapidOCR  # takes a second to import: only where images are read

    return RapidOCR(params={"Global.log_level": "error"})
