"""Preference pairs of one's own: two images of a prompt and which of them people prefer, read from files.

A file is JSON lines, a JSON array, CSV or Parquet; the keys of a row tell what it is:

- ``prompt``, ``chosen``, ``rejected``: a pair;
- ``prompt``, ``image_0``, ``image_1``, ``winner`` (0, 1 or "tie"): a comparison;
- ``caption``, ``jpg_0``, ``jpg_1``, ``label_0``, ``label_1`` and optionally ``has_label``: Pick-a-Pic, and what
  ``vargpt-rl pairs RUN --export`` writes;
- ``prompt``, ``image_path`` (or ``file_path``) and one of ``human_preference`` (1 for the preferred image), ``rank``
  (1 for the best) and ``raw_annotations`` (a rank list of each annotator): HPDv2. A row of n images is n (n - 1) / 2
  comparisons; annotators are counted by comparison.

An image is a name below the folder of images, or encoded bytes, alone or as ``{bytes, path}``. Encoded images are
written once to a folder of the run, under the hash of their content, so that workers load them like others.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from vargpt_rl.data.images import KINDS, MAX_PIXELS, ImageSource, RefusedImage, open_plain, read_image
from vargpt_rl.data.quarantine import Quarantine
from vargpt_rl.data.records.formats import FORMAT_OF, Fault, Row
from vargpt_rl.data.samples import Prompt
from vargpt_rl.data.sources import rows_of, shown_row, text_field
from vargpt_rl.model.prompt import REPLY
from vargpt_rl.storage.files import content_hash, write_atomically

PREFIX, GIVEN, KEPT = "pairs", "given", "kept"
"""Parts of the keys of images: ``pairs/given/<name>`` and ``pairs/kept/<hash>``."""
TIE, NO_LABEL, SAME_IMAGE = "tie", "no label", "same image twice"
"""Reasons why a comparison is no pair."""
PREVIEW = 64
"""Pixels a side to which an image is decoded to see whether it can be."""


class Judgement(NamedTuple):
    """Two images of a row by their places, and the preferred one: 0, 1, or None with the reason why there is none."""

    images: tuple[int, int]
    winner: int | None
    reason: str = ""


class Judged(NamedTuple):
    """A row as read: the prompt, its images as they are written, and what is said of them."""

    text: str
    images: Sequence[Any]
    comparisons: list[Judgement]


@dataclass(frozen=True)
class OwnPair:
    """A pair of image keys. ``place`` is its file and row."""

    id: str
    prompt: Prompt
    chosen: str
    rejected: str
    place: str


@dataclass(frozen=True)
class OwnPairs:
    """Pairs of people's preferences, in the order of the files; comparisons that are no pair, by reason."""

    pairs: list[OwnPair]
    left_out: Counter[str]
    lines: int
    held_out: frozenset[str]
    """Ids of the prompts whose pairs are never trained on."""

    def split(self, name: str) -> list[OwnPair]:
        """Return the pairs of a split, "train" or "held_out"."""
        return [pair for pair in self.pairs if (pair.prompt.id in self.held_out) == (name == "held_out")]


@dataclass(frozen=True)
class PairImages(ImageSource):
    """The images of pairs by key: names below ``given``, and files below ``kept``."""

    given: Path
    kept: Path
    max_pixels: int = MAX_PIXELS

    def path(self, key: str) -> Path:
        """Return the file of a key. ValueError for another key."""
        prefix, kind, name = (*key.split("/", 2), "", "")[:3]
        folders = {GIVEN: self.given, KEPT: self.kept}
        if prefix != PREFIX or kind not in folders or not name:
            raise ValueError(f"image key {key!r}: expected 'pairs/given/<name>' or 'pairs/kept/<hash>'")
        return folders[kind] / below(name)

    def load(self, key: str, side: int) -> Image.Image:
        image = read_image(self.path(key), self.max_pixels)
        return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)


def below(name: str) -> str:
    """Return a relative path. ValueError for one that leads out of its folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"image {name!r} leaves the folder of images")
    return str(path)


def pair_files(path: Path) -> list[Path]:
    """Return the files of pairs at a path: itself, or those in the folder. ValueError if there are none."""
    if path.is_dir():
        found = sorted(each for each in path.iterdir() if each.suffix.lower() in FORMAT_OF and each.is_file())
        if not found:
            raise ValueError(f"{path}: no files of pairs in this folder, expected some of {', '.join(FORMAT_OF)}")
        return found
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    if path.suffix.lower() not in FORMAT_OF:
        raise ValueError(f"{path}: expected a file of kind {', '.join(FORMAT_OF)}")
    return [path]


# Kinds of rows


def _pair(row: Row) -> Judged:
    return Judged(text_field(row, "prompt"), (row["chosen"], row["rejected"]), [Judgement((0, 1), 0)])


def _comparison(row: Row) -> Judged:
    winner = row["winner"]
    if winner not in (0, 1, "0", "1", "tie", None) or isinstance(winner, bool):
        raise ValueError(f'"winner" is {winner!r}, expected 0, 1 or "tie"')
    reason = NO_LABEL if winner is None else TIE if winner == "tie" else ""
    found = Judgement((0, 1), None if reason else int(winner), reason)
    return Judged(text_field(row, "prompt"), (row["image_0"], row["image_1"]), [found])


def _pick_a_pic(row: Row) -> Judged:
    labels = [row[name] for name in ("label_0", "label_1")]
    if row.get("has_label") is False or None in labels:
        found = Judgement((0, 1), None, NO_LABEL)
    else:
        first, second = (_number(label, "label_0 and label_1") for label in labels)
        found = _by_value(0, 1, first, second)
    return Judged(text_field(row, "caption"), (row["jpg_0"], row["jpg_1"]), [found])


def _hpd(row: Row) -> Judged:
    images = row["image_path"] if "image_path" in row else row["file_path"]
    if not isinstance(images, list) or len(images) < 2:
        raise ValueError(f"expected a list of at least two images, got {shown(images)}")
    scores = _scores(row, len(images))
    found = [_voted(i, j, [(each[i], each[j]) for each in scores]) for i, j in combinations(range(len(images)), 2)]
    return Judged(text_field(row, "prompt"), images, found)


def _scores(row: Row, count: int) -> list[list[float]]:
    """Return a score for each image of a row, the best one highest: of all people, or a list for each annotator."""
    if "human_preference" in row:
        return [_numbers(row["human_preference"], count, "human_preference")]
    if "rank" in row:
        return [[-rank for rank in _numbers(row["rank"], count, "rank")]]
    annotations = row["raw_annotations"] if "raw_annotations" in row else row["raw_annotation"]
    if isinstance(annotations, dict):
        annotations = list(annotations.values())
    if not isinstance(annotations, list) or not annotations:
        raise ValueError(f'"raw_annotations" is {shown(annotations)}, expected ranks of at least one annotator')
    ranks = [each["rank"] if isinstance(each, dict) and "rank" in each else each for each in annotations]
    return [[-rank for rank in _numbers(each, count, "raw_annotations")] for each in ranks]


def _voted(i: int, j: int, scores: list[tuple[float, float]]) -> Judgement:
    """Return what most annotators say of two images."""
    return _by_value(i, j, sum(one > other for one, other in scores), sum(one < other for one, other in scores))


def _by_value(i: int, j: int, first: float, second: float) -> Judgement:
    return Judgement((i, j), None, TIE) if first == second else Judgement((i, j), int(second > first))


def _numbers(values: Any, count: int, name: str) -> list[float]:
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f'"{name}" is {shown(values)}, expected {count} numbers, one for each image')
    return [_number(value, name) for value in values]


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise ValueError(f'"{name}": {value!r} is no number')
    return float(value)


def shown(value: Any) -> str:
    """Return a value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


KINDS_OF_ROWS: tuple[tuple[tuple[tuple[str, ...], ...], Callable[[Row], Judged]], ...] = (
    ((("chosen",), ("rejected",)), _pair),
    ((("jpg_0",), ("jpg_1",), ("label_0",), ("label_1",)), _pick_a_pic),
    ((("image_0",), ("image_1",), ("winner",)), _comparison),
    ((("image_path", "file_path"), ("human_preference", "rank", "raw_annotations", "raw_annotation")), _hpd),
)
"""Readers of rows by the keys that they need, one of each."""
EXPECTED = "prompt, chosen and rejected; or the keys of Pick-a-Pic or HPDv2"


def judged(row: Row) -> Judged:
    """Read a row by its keys. ValueError with the reason if it cannot be used."""
    for needed, reader in KINDS_OF_ROWS:
        if all(any(key in row for key in keys) for keys in needed):
            return reader(row)
    keys = ", ".join(sorted(map(str, row))[:12]) or "none"
    raise ValueError(f"the row has the keys {keys}; expected {EXPECTED}")


# Reading files


@dataclass
class PairReader:
    """Reads rows to pairs, each image checked once. ``images`` says where they are."""

    images: PairImages
    checked: dict[str, str] = field(default_factory=dict)
    """Image keys, each with the reason why it cannot be used, or none."""

    def read(self, row: Row, place: str, left_out: Counter[str]) -> Iterator[OwnPair]:
        """Yield the pairs of a row. ValueError with the reason if it or one of its images cannot be used."""
        found = judged(row)
        keys = [self._key(value) for value in found.images]
        prompt = Prompt(prompt_id(found.text), found.text, REPLY)
        for number, ((i, j), winner, reason) in enumerate(found.comparisons):
            if winner is None or keys[i] == keys[j]:
                left_out[reason or SAME_IMAGE] += 1
                continue
            chosen, rejected = (keys[i], keys[j]) if winner == 0 else (keys[j], keys[i])
            name = hashlib.blake2b(f"{place} {number} {chosen} {rejected}".encode(), digest_size=8).hexdigest()
            yield OwnPair(id=name, prompt=prompt, chosen=chosen, rejected=rejected, place=place)

    def _key(self, value: Any) -> str:
        if isinstance(value, dict):  # as the datasets library writes images
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            name = content_hash(value)
            key = f"{PREFIX}/{KEPT}/{name}"
            if key not in self.checked:
                self.checked[key] = _fault(io.BytesIO(value))
                if not self.checked[key] and not (self.images.kept / name).exists():
                    self.images.kept.mkdir(parents=True, exist_ok=True)
                    write_atomically(self.images.kept / name, value)
        elif isinstance(value, str) and value:
            key = f"{PREFIX}/{GIVEN}/{below(value)}"
            if key not in self.checked:
                self.checked[key] = _fault(self.images.path(key))
        else:
            raise ValueError(f"image {shown(value)}: expected the name of a file or encoded bytes")
        if reason := self.checked[key]:
            raise ValueError(f"image {key.split('/', 2)[2]}: {reason}")
        return key


def _fault(file: Path | io.BytesIO) -> str:
    """Return why an image cannot be decoded; empty if it can. JPEG is decoded small, which is quick."""
    try:
        with ExitStack() as opened:
            stream = opened.enter_context(open_plain(file)) if isinstance(file, Path) else file
            image = opened.enter_context(Image.open(stream, formats=KINDS))
            if image.width * image.height > MAX_PIXELS:
                raise RefusedImage(f"image of more than {MAX_PIXELS} pixels")
            image.draft("RGB", (PREVIEW, PREVIEW))
            image.load()
    except FileNotFoundError:
        return "no such file"
    except RefusedImage as error:
        return str(error)
    except Exception as error:  # Pillow's decoders raise errors of many kinds on broken files
        return f"not a readable image ({type(error).__name__})"
    return ""


def prompt_id(text: str) -> str:
    """Return the id of a prompt: the same text has the same id."""
    return f"pairs-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def read_own_pairs(
    path: Path, images: PairImages, quarantine: Quarantine, held_out_fraction: float, max_bad_fraction: float
) -> OwnPairs:
    """Read the pairs of a file or folder. Rows that cannot be used are quarantined with file and row.

    ValueError naming the first of them if they are more than ``max_bad_fraction`` of all rows, and if no pair is left.
    """
    reader = PairReader(images)
    pairs: list[OwnPair] = []
    left_out: Counter[str] = Counter()
    bad: list[str] = []
    lines = 0
    for file in pair_files(path):
        for place, row in rows_of(file, FORMAT_OF[file.suffix.lower()]):
            lines += 1
            try:
                if isinstance(row, Fault):
                    raise ValueError(row.reason)
                pairs += list(reader.read(row, place, left_out))
            except ValueError as fault:
                quarantine.add(place, _without_bytes(row), str(fault))
                bad.append(f"{place}: {fault}")
    if len(bad) > max_bad_fraction * lines:
        raise ValueError(
            f"{bad[0]} ({len(bad)} of {lines} rows of preference.pairs cannot be used, more than "
            f"data.max_bad_fraction={max_bad_fraction}; all are in {quarantine.path})"
        )
    if not pairs:
        raise ValueError(f"preference.pairs={path}: no pair in {lines} rows; left out: {dict(left_out)}")
    return OwnPairs(pairs, left_out, lines, held_out_prompts(pairs, held_out_fraction))


def _without_bytes(row: Row | Fault) -> str:
    if isinstance(row, Fault):
        return shown_row(row)
    return json.dumps(
        {key: shown(value) if isinstance(value, bytes) else value for key, value in row.items()}, default=shown
    )


def held_out_prompts(pairs: Sequence[OwnPair], fraction: float) -> frozenset[str]:
    """Return the ids of the prompts that are held out: at least one if there are two, chosen by their hashes."""
    names = sorted({pair.prompt.id for pair in pairs})
    if fraction == 0 or len(names) < 2:
        return frozenset()
    return frozenset(names[: min(len(names) - 1, max(1, round(fraction * len(names))))])


def shuffled(items: Sequence[Any], seed: int) -> list[Any]:
    """Return items in an order that follows from the seed."""
    return [items[index] for index in np.random.default_rng(seed).permutation(len(items))]
