"""Sources of images and prompts: the shapes world, or a folder of captioned images.

An image has a key, a string that travels instead of pixels; only the process that needs the image loads it.
`prompts_from_file` reads prompts alone.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from vargpt_rl.data import shapes, shapes_tasks
from vargpt_rl.data.images import MAX_PIXELS, ImageSource, read_image
from vargpt_rl.data.quarantine import Quarantine
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
        """What is wrong; empty if nothing is."""
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


@dataclass(frozen=True)
class CaptionedConfig:
    """Captions and the folders of their images."""

    captions: str
    """JSON lines file."""
    images: str
    """Folder of the captions' images."""
    winners: str
    """Folder of a stronger system's images, under the same names."""
    image_field: str = "file"
    """Key of the image's name in the caption lines."""
    caption_field: str = "caption"
    id_field: str = "id"
    held_out_fraction: float = 0.1
    """Fraction of the captions that is never trained on."""
    background: tuple[int, int, int] = (255, 255, 255)
    """RGB that transparent images are laid on."""
    max_pixels: int = MAX_PIXELS
    """Larger images are unreadable."""

    def __post_init__(self):
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction is {self.held_out_fraction}, expected 0 or more and less than 1")


@dataclass(frozen=True)
class _Entry:
    prompt: Prompt
    file: str


class CaptionedSource(Source):
    """Captioned images of one's own. Keys are "images/<file>" and "winners/<file>".

    Malformed lines and captions whose image is missing are quarantined. Images and winners without a caption, and
    captions without a winner (usable for SFT, not for pairs), are noted there as not lost. ``lines`` counts the
    captions read: the total to check the quarantine against. Raises ValueError if the file or a folder is missing, or
    no caption is usable.
    """

    def __init__(self, config: CaptionedConfig, quarantine: Quarantine):
        self.config = config
        # Workers run in other directories, hence absolute.
        self._folders = {"images": _folder(config.images), "winners": _folder(config.winners)}
        lines = _lines(Path(config.captions))
        self.lines = len(lines)
        self._entries: dict[str, _Entry] = {}
        self._with_winner: set[str] = set()
        named: set[str] = set()
        for where, line in lines:
            try:
                entry = self._entry(line)
                named.add(entry.file)
                self._admit(entry)
            except ValueError as fault:
                quarantine.add(where, _readable(line), str(fault))
                continue
            if self._exists("winners", entry.file):
                self._with_winner.add(entry.prompt.id)
            else:
                quarantine.add(where, _readable(line), "caption without a winner", lost=False)
        for kind, reason in (("images", "image without a caption"), ("winners", "winner without a prompt")):
            for file in sorted(image_files(self._folders[kind]) - named):
                quarantine.add(str(self._folders[kind] / file), file, reason, lost=False)
        if not self._entries:
            raise ValueError(f"{config.captions}: no usable caption in {self.lines} lines\n{quarantine.table()}")

    def _entry(self, line: bytes) -> _Entry:
        """Parse a line. Raises ValueError with the reason if it is malformed."""
        names = (self.config.id_field, self.config.caption_field, self.config.image_field)
        identity, caption, file = _fields(line, names)
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f'"{self.config.image_field}" leaves the image folder')
        return _Entry(Prompt(identity, caption, REPLY), str(path))

    def _admit(self, entry: _Entry) -> None:
        if entry.prompt.id in self._entries:
            raise ValueError(f'"{self.config.id_field}" is that of an earlier line')
        if not self._exists("images", entry.file):
            raise ValueError("caption without an image")
        self._entries[entry.prompt.id] = entry

    def _exists(self, kind: str, file: str) -> bool:
        return os.path.isfile(self._folders[kind] / file)  # False, unlike Path.is_file, for names no file can have

    def load(self, key: str, side: int) -> Image.Image:
        kind, _, file = key.partition("/")
        if kind not in self._folders or not file:
            raise ValueError(f"image key {key!r}: expected 'images/<file>' or 'winners/<file>'")
        path = self._folders[kind] / file
        image = read_image(path, self.config.max_pixels, tuple(self.config.background))
        return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)

    def records(self, count: int, seed: int) -> list[Record]:
        entries = self._shuffled("train", seed)
        repeated = (entries[index % len(entries)] for index in range(count))
        return [Record(entry.prompt.id, entry.prompt, f"images/{entry.file}") for entry in repeated]

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        return [entry.prompt for entry in self._shuffled(split, seed)[:count]]

    def _shuffled(self, split: str, seed: int) -> list[_Entry]:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}, expected one of {SPLITS}")
        share, wanted = self.config.held_out_fraction, split == "held_out"
        entries = [entry for entry in self._entries.values() if is_held_out(entry.prompt.id, share) == wanted]
        if not entries:
            raise ValueError(f"{self.config.captions}: no {split} captions (held_out_fraction is {share})")
        return [entries[index] for index in np.random.default_rng(seed).permutation(len(entries))]

    def winner_key(self, prompt: Prompt) -> str | None:
        return f"winners/{self._entries[prompt.id].file}" if prompt.id in self._with_winner else None


def _folder(path: str) -> Path:
    folder = Path(path).resolve()
    if not folder.is_dir():
        raise ValueError(f"{path}: no such folder of images")
    return folder


def image_files(folder: Path) -> set[str]:
    """Return the names of the image files below ``folder``, relative to it."""
    suffixes = Image.registered_extensions()
    files = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    return {path.relative_to(folder).as_posix() for path in files}


def prompts_from_file(path: Path, quarantine: Quarantine) -> list[Prompt]:
    """Read the different prompts of a file: .txt with one a line, or .jsonl with the key "prompt" and optionally "id".

    Malformed lines and repeated prompts and ids are quarantined, repetitions as not lost. Raises ValueError if the file
    is missing, of another kind, or has no usable prompt.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: expected a .txt or .jsonl file of prompts")
    prompts: dict[str, Prompt] = {}
    ids: set[str] = set()
    for where, line in _lines(path):
        try:
            prompt = _prompt(line, path)
        except ValueError as fault:
            quarantine.add(where, _readable(line), str(fault))
            continue
        if prompt.text in prompts or prompt.id in ids:
            reason = "prompt of an earlier line" if prompt.text in prompts else "id of an earlier line"
            quarantine.add(where, _readable(line), reason, lost=False)
        else:
            prompts[prompt.text] = prompt
            ids.add(prompt.id)
    if not prompts:
        raise ValueError(f"{path}: no usable prompt")
    return list(prompts.values())


def _prompt(line: bytes, path: Path) -> Prompt:
    """Parse a line. Raises ValueError with the reason if it is malformed."""
    record: dict[str, object] = _record(line) if path.suffix == ".jsonl" else {"prompt": _decoded(line).strip()}
    text = _text(record, "prompt")
    return Prompt(_text(record, "id") if "id" in record else f"{path.stem}-{_stable_int(text):016x}", text, REPLY)


def _lines(path: Path) -> list[tuple[str, bytes]]:
    """Return the lines of a file that are not blank, each with "<file>:<line>"."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def _decoded(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error


def _readable(line: bytes) -> str:
    return line.decode(errors="backslashreplace").strip()


def _fields(line: bytes, names: Sequence[str]) -> list[str]:
    """Return the texts under ``names`` of a JSON object. Raises ValueError with the reason if it is malformed."""
    record = _record(line)
    return [_text(record, name) for name in names]


def _record(line: bytes) -> dict[str, object]:
    """Parse a JSON object. Raises ValueError with the reason if the line is none."""
    try:
        record = json.loads(_decoded(line))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}") from error
    except RecursionError as error:
        raise ValueError("not JSON: too deeply nested") from error
    if not isinstance(record, dict):
        raise ValueError(f"{type(record).__name__} where a JSON object is expected")
    return record


def _text(record: dict[str, object], name: str) -> str:
    if name not in record:
        raise ValueError(f'"{name}" is missing')
    value = record[name]
    if not isinstance(value, str):
        raise ValueError(f'"{name}" is of type {type(value).__name__}, expected str')
    if not value.strip():
        raise ValueError(f'"{name}" is empty')
    if re.search("[\0\ud800-\udfff]", value):  # half characters, which JSON can spell but UTF-8 cannot
        raise ValueError(f'"{name}" has characters that are no text')
    return value
