"""A folder of captioned images of one's own, and a stronger system's images beside it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

from vargpt_rl.data.image_names import ImageNames
from vargpt_rl.data.images import MAX_PIXELS, read_image
from vargpt_rl.data.quarantine import Quarantine
from vargpt_rl.data.records.formats import FORMAT_OF, Fault, Row
from vargpt_rl.data.samples import Prompt, Record
from vargpt_rl.data.sources import SPLITS, Source, id_field, is_held_out, rows_of, shown_row, text_field
from vargpt_rl.model.prompt import REPLY


@dataclass(frozen=True)
class CaptionedConfig:
    """Captions and the folders of their images."""

    captions: str
    """File of captions: JSON lines or an array, CSV or Parquet, by its ending."""
    images: str
    """Folder of the captions' images."""
    winners: str | None = None
    """Folder of a stronger system's images, under the same names; without it, a caption's winner is its own image."""
    image_field: str = "file"
    """Key of the image's name in the captions."""
    caption_field: str = "caption"
    id_field: str = "id"
    """Key of the identifier; a caption without one has its image's name."""
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
    winner: str | None


class CaptionedSource(Source):
    """Captioned images of one's own. Keys are "images/<file>" and "winners/<file>".

    A file is also found if its name differs from the caption's in Unicode normal form or letter case only; a winner may
    have another ending. Malformed rows and captions whose image is missing are quarantined. Images and winners without
    a caption, and captions without a winner (usable for SFT, not for pairs), are noted there as not lost. ``lines``
    counts the captions read: the total to check the quarantine against. Raises ValueError if the file or a folder is
    missing, no caption is usable, or none has a winner.
    """

    def __init__(self, config: CaptionedConfig, quarantine: Quarantine):
        self.config = config
        # Workers run in other directories, hence absolute.
        self._folders = {"images": _folder(config.images)}
        if config.winners is not None:
            self._folders["winners"] = _folder(config.winners)
        names = {kind: ImageNames(folder) for kind, folder in self._folders.items()}
        self.lines = 0
        self._entries: dict[str, _Entry] = {}
        keys: set[str] = set()
        for where, row in self._rows():
            self.lines += 1
            try:
                if isinstance(row, Fault):
                    raise ValueError(row.reason)
                keys |= row.keys()
                entry = self._entry(row, names)
            except ValueError as fault:
                quarantine.add(where, shown_row(row), str(fault))
                continue
            self._entries[entry.prompt.id] = entry
            if "winners" not in names:
                continue
            if entry.winner is None:
                quarantine.add(where, shown_row(row), "caption without a winner", lost=False)
            elif len(found := names["winners"].like(entry.file)) > 1:
                quarantine.add(where, ", ".join(found), "several winners, of which the first is taken", lost=False)
        images = {entry.file for entry in self._entries.values()}
        winners = {entry.winner for entry in self._entries.values() if entry.winner}
        for kind, used, reason in (
            ("images", images, "image without a caption"),
            ("winners", winners, "winner without a prompt"),
        ):
            for file in sorted(names[kind].files - used) if kind in names else ():
                quarantine.add(str(self._folders[kind] / file), file, reason, lost=False)
        self._check_usable(quarantine, keys)

    def _rows(self) -> Iterator[tuple[str, Row | Fault]]:
        """Return the rows of the captions, each with its place."""
        path = Path(self.config.captions)
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        return rows_of(path, FORMAT_OF.get(path.suffix.lower(), "jsonl"))

    def _check_usable(self, quarantine: Quarantine, keys: set[str]) -> None:
        config = self.config
        if not self._entries:
            raise ValueError(
                f"{config.captions}: no usable caption in {self.lines} lines\n{quarantine.table()}\n"
                f"The lines have the keys {', '.join(sorted(keys)[:20]) or '(none)'}; data.image_field="
                f"{config.image_field}, data.caption_field={config.caption_field} and data.id_field={config.id_field} "
                f"are read"
            )
        if config.winners is not None and not any(entry.winner for entry in self._entries.values()):
            example = next(iter(self._entries.values())).file
            raise ValueError(
                f"preference.winners={config.winners}: no winner of {len(self._entries)} captions, expected names such "
                f"as {example}, with any ending of an image"
            )

    def _entry(self, row: Row, names: dict[str, ImageNames]) -> _Entry:
        """Return the caption of a row. Raises ValueError with the reason if it cannot be used."""
        config = self.config
        name = text_field(row, config.image_field)
        caption = text_field(row, config.caption_field)
        identity = name if row.get(config.id_field) in (None, "") else id_field(row, config.id_field)
        if not self._exists("images", name):
            name = name.replace("\\", "/")
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f'"{config.image_field}" leaves the image folder')
        if identity in self._entries:
            raise ValueError(f'"{config.id_field}" is that of an earlier line')
        file, name = str(path), str(path)
        if not self._exists("images", name):
            found = names["images"].named(name)
            if len(found) != 1:
                reason = "image's name differs from several in letter case" if found else "caption without an image"
                raise ValueError(reason)
            (file,) = found
        return _Entry(Prompt(identity, caption, REPLY), file, self._winner(name, names.get("winners")))

    def _winner(self, name: str, winners: ImageNames | None) -> str | None:
        if winners is None:
            return None
        if self._exists("winners", name):
            return name
        found = winners.like(name)
        return found[0] if found else None

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
        entry = self._entries.get(prompt.id)
        if entry is None:
            return None
        if self.config.winners is None:
            return f"images/{entry.file}"
        return f"winners/{entry.winner}" if entry.winner else None


def _folder(path: str) -> Path:
    folder = Path(path).resolve()
    if not folder.is_dir():
        raise ValueError(f"{path}: no such folder of images")
    return folder
