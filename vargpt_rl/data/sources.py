"""Sources of images and prompts, and the shapes world. `vargpt_rl.data.captioned` has folders of captioned images.

An image has a key, a string that travels instead of pixels; only the process that needs the image loads it.
`prompts_from_file` reads prompts alone.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vargpt_rl.common.wording import NO_TEXT, is_blank
from vargpt_rl.data import shapes, shapes_tasks
from vargpt_rl.data.images import ImageSource
from vargpt_rl.data.quarantine import Quarantine
from vargpt_rl.data.records.formats import FORMATS, Fault, LeftOut, Row, text_lines
from vargpt_rl.data.records.reader import file_parts
from vargpt_rl.data.samples import ImageEdit, ImageQuestion, Prompt, Record
from vargpt_rl.data.shapes_check import ShapesCheck
from vargpt_rl.data.shapes_edit_check import EditCheck
from vargpt_rl.model.prompt import REPLY

SPLITS = ("train", "held_out")


class Verdict(Protocol):
    """An exact judgement of one image."""

    @property
    def correct(self) -> bool: ...

    @property
    def reason(self) -> str:
        """The reason why it is wrong; empty if it is not."""
        ...


class ImageCheck(Protocol):
    """An exact judge of images. Pickled into rollout workers."""

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[Any]:
        """Judge each image against its prompt: a `Verdict` each."""

    def skills(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return what each prompt tests, by which results are grouped."""

    def values(self, verdicts: Sequence[Any]) -> list[float]:
        """Return each verdict as a number, 1 for right; their mean is "overall" of `scores`."""

    def scores(self, prompts: Sequence[Prompt], verdicts: Sequence[Any]) -> dict[str, float]:
        """Return held-out measures, among them "overall", "overall_low" and "overall_high", its interval, and "n"."""


class Source(ImageSource, Protocol):
    """Images with their prompts. Pickled into rollout workers, so it holds a config and small tables only.

    ``lines`` counts the records that were read and could have been bad. A source of one's own subclasses this and
    overrides what it can do; questions, edits and exact checks are optional.
    """

    lines: int = 0

    def records(self, count: int, seed: int) -> list[Record]:
        """Return ``count`` training images for SFT; they repeat in cycles if there are fewer."""
        return []

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        """Return ``count`` prompts of a split ("train" or "held_out"), or all if there are fewer."""
        ...

    def winner_key(self, prompt: Prompt) -> str | None:
        """Return the key of the stronger system's image for ``prompt``, or None if there is none."""
        return None

    def questions(self, count: int, seed: int, split: str) -> list[ImageQuestion]:
        """Return ``count`` questions about images of a split; none by default."""
        return []

    def edits(self, count: int, seed: int, split: str = "train") -> list[ImageEdit]:
        """Return ``count`` edits of a split; none by default."""
        return []

    def image_check(self) -> ImageCheck | None:
        """Return the exact judge of images generated for prompts, or None if there is none."""
        return None

    def edit_check(self) -> ImageCheck | None:
        """Return the exact judge of generated edits, or None if there is none.

        An edit's prompt shows the image before the edit (`Prompt.shown`); its id is the key of the image after it.
        """
        return None


def _stable_int(text: str) -> int:
    """Hash ``text`` to a number from 0 to 2**64 - 1 that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def is_held_out(identity: str, fraction: float) -> bool:
    """Return whether the record or caption with this id is in the ``fraction`` that is never trained on."""
    return _stable_int(f"held out {identity}") < fraction * 2**64


@dataclass(frozen=True)
class ShapesConfig:
    """Styles, of `shapes.STYLES`."""

    corpus_style: str = "corpus"
    """Style of the SFT corpus."""
    winner_style: str = "commercial"
    """Style of the stronger system's images."""

    def __post_init__(self):
        for style in (self.corpus_style, self.winner_style):
            if style not in shapes.STYLES:
                raise ValueError(f"unknown shapes style {style!r}, expected one of {shapes.STYLES}")


class ShapesSource(Source):
    """The shapes world, drawn on demand.

    A key is "<kind>/<seed>/<caption>": the seed lays out the caption's scene. The kind is the style to draw it in, or
    "edited" for the scene after the edit that follows from the same seed.
    """

    def __init__(self, config: ShapesConfig):
        self.config = config

    def scene(self, key: str) -> shapes.Scene:
        """Return the scene that the image of ``key`` shows. Raises ValueError for a malformed key."""
        return self._rebuild(key)[1]

    def load(self, key: str, side: int) -> Image.Image:
        style, scene, rng = self._rebuild(key)
        return shapes.render(scene, side, style, rng)

    def _rebuild(self, key: str) -> tuple[str, shapes.Scene, np.random.Generator]:
        match = re.fullmatch(r"(\w+)/([0-9]+)/(.+)", key)
        if not match:
            raise ValueError(f"shapes key {key!r}: expected '<style>/<seed>/<caption>'")
        kind, seed, caption = match.groups()
        rng = np.random.default_rng(int(seed))
        scene = shapes.scene_for(caption, rng)
        if kind != "edited":
            return kind, scene, rng
        return self.config.winner_style, shapes_tasks.edit(scene, rng)[1], rng

    def records(self, count: int, seed: int) -> list[Record]:
        return [
            Record(prompt.id, prompt, f"{self.config.corpus_style}/{_stable_int(f'corpus {prompt.id}')}/{prompt.text}")
            for prompt in self.prompts("train", count, seed)
        ]

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        return [
            Prompt(f"shapes-{split}-{seed}-{index}", caption, REPLY)
            for index, caption in enumerate(_captions(split, count, seed))
        ]

    def winner_key(self, prompt: Prompt) -> str | None:
        try:
            shapes.parse(prompt.text)
        except ValueError:
            return None
        return f"{self.config.winner_style}/{_stable_int(f'winner {prompt.id}')}/{prompt.text}"

    def questions(self, count: int, seed: int, split: str) -> list[ImageQuestion]:
        """Return ``count`` questions about plain and winner-style images in turn."""
        asked = []
        for index, caption in enumerate(_captions(split, count, seed)):
            style = ("clean", self.config.winner_style)[index % 2]
            key = f"{style}/{_stable_int(f'question {split} {seed} {index}')}/{caption}"
            _, scene, rng = self._rebuild(key)
            asked.append(ImageQuestion(key, *shapes_tasks.question(scene, rng)))
        return asked

    def edits(self, count: int, seed: int, split: str = "train") -> list[ImageEdit]:
        """Return ``count`` edits of winner-style images."""
        edits = []
        for index, caption in enumerate(_captions(split, count, seed)):
            layout = f"{_stable_int(f'edit {split} {seed} {index}')}/{caption}"
            before = f"{self.config.winner_style}/{layout}"
            _, scene, rng = self._rebuild(before)
            edits.append(ImageEdit(before, shapes_tasks.edit(scene, rng)[0], f"edited/{layout}"))
        return edits

    def image_check(self) -> ShapesCheck:
        return ShapesCheck()

    def edit_check(self) -> EditCheck:
        return EditCheck(self.scene)


def _captions(split: str, count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [shapes.sample_scene(rng, split=split).caption for _ in range(count)]


def prompts_from_file(path: Path, quarantine: Quarantine) -> list[Prompt]:
    """Read the different prompts of a file: .txt with one a line, or .jsonl with the key "prompt" and optionally "id".

    Malformed lines and repeated prompts and ids are quarantined, repetitions as not lost. Raises ValueError if the file
    is missing, of another kind, or has no usable prompt.
    """
    path = Path(path)
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: expected a .txt or .jsonl file of prompts")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    prompts: dict[str, Prompt] = {}
    ids: set[str] = set()
    for where, row in _prompt_rows(path):
        try:
            if isinstance(row, Fault):
                raise ValueError(row.reason)
            prompt = _prompt(row, path)
        except ValueError as fault:
            quarantine.add(where, shown_row(row), str(fault))
            continue
        if prompt.text in prompts or prompt.id in ids:
            reason = "prompt of an earlier line" if prompt.text in prompts else "id of an earlier line"
            quarantine.add(where, shown_row(row), reason, lost=False)
        else:
            prompts[prompt.text] = prompt
            ids.add(prompt.id)
    if not prompts:
        raise ValueError(f"{path}: no usable prompt")
    return list(prompts.values())


def _prompt_rows(path: Path) -> Iterator[tuple[str, Row | Fault]]:
    """Yield the prompts of a file as rows, each with "<file>:<line>". ValueError for a file that is not UTF-8 text."""
    if path.suffix.lower() == ".jsonl":
        yield from rows_of(path, "jsonl")
        return
    FORMATS["jsonl"].check(path)
    for number, line in text_lines(path):
        where = f"{path}:{number + 1}"
        if line is None:
            yield where, Fault("line is too long")
        elif line.strip():
            try:
                texts = [text.strip() for text in re.split(r"[\r\n]+", line.decode().strip())]
            except UnicodeDecodeError:
                yield where, Fault("not UTF-8", line.decode(errors="backslashreplace"))
                continue
            for text in texts:
                is_row = text.startswith("{") and text.endswith("}") and '":' in text
                yield where, Fault("JSON where plain text is expected", text) if is_row else {"prompt": text}


def rows_of(path: Path, kind: str) -> Iterator[tuple[str, Row | Fault]]:
    """Yield all rows of a file of a format, each with its place. ValueError if it is missing or of another kind."""
    for part in file_parts([path], FORMATS[kind]):
        yield from ((part.place(number), row) for number, row in part.read(0, 1) if not isinstance(row, LeftOut))


def shown_row(row: Row | Fault) -> str:
    """Return a row as text, for the quarantine."""
    return row.found if isinstance(row, Fault) else json.dumps(row, default=repr)


def _prompt(row: Row, path: Path) -> Prompt:
    """Return a row's prompt. Raises ValueError with the reason if it is malformed."""
    text = text_field(row, "prompt")
    identity = f"{path.stem}-{_stable_int(text):016x}" if row.get("id") is None else id_field(row, "id")
    return Prompt(identity, text, REPLY)


def id_field(row: Row, name: str) -> str:
    """Return a text, or a whole number as text. Raises ValueError with the reason if it is neither."""
    number = whole_number(row.get(name))
    return text_field(row, name) if number is None else str(number)


def whole_number(value: object) -> int | None:
    """Return a whole number, also one that pandas wrote as a float because the column has gaps; None if it is none."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def text_field(row: Row, name: str) -> str:
    """Return a text that is not blank. Raises ValueError with the reason if it is none."""
    if name not in row:
        raise ValueError(f'"{name}" is missing')
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f'"{name}" is of type {type(value).__name__}, expected str')
    if NO_TEXT.search(value):
        raise ValueError(f'"{name}" has characters that are no text')
    if is_blank(value):
        raise ValueError(f'"{name}" is empty')
    return value
