"""A source of records as it is configured: its files, their format and layout, and the folder of their images."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from glob import glob
from pathlib import Path
from typing import Annotated

from vargpt_rl.common.settings import Line, OneOf, Positive
from vargpt_rl.data.records.formats import FORMATS
from vargpt_rl.data.records.layouts import (
    Import,
    class_names,
    editing,
    imagenet,
    journeydb,
    laion,
    llava,
    native,
)
from vargpt_rl.data.records.reader import ReadOptions, Records, file_parts
from vargpt_rl.data.records.schema import Limit, RecordConversation

LAYOUTS = {"native": native, "llava": llava, "journeydb": journeydb, "laion": laion, "editing": editing}


@dataclass
class RecordSource:
    """Files of records, as configured."""

    files: list[Line] = field(default_factory=list)
    """Paths or globs."""
    format: Annotated[str, OneOf(*FORMATS)] = "jsonl"
    """Format of the files, a key of `vargpt_rl.data.records.formats.FORMATS`."""
    layout: Annotated[str, OneOf(*LAYOUTS, "imagenet")] = "native"
    """Layout of the rows, a key of `LAYOUTS` or "imagenet"."""
    images: Line | None = None
    """Folder that the names of images are relative to; by default that of the first file."""
    names: Line | None = None
    """File of class names; for the layout imagenet only."""
    weight: Positive = 1.0
    """Share of a batch, relative to the other sources of the same modality."""

    def __post_init__(self):
        if (self.layout == "imagenet") != (self.names is not None):
            raise ValueError(f"layout={self.layout} with names={self.names}: imagenet needs names, no other takes it")

    def absolute(self) -> "RecordSource":
        """Return the same source for processes that run in another folder."""
        images, names = (value and str(Path(value).resolve()) for value in (self.images, self.names))
        return replace(self, files=[os.path.abspath(pattern) for pattern in self.files], images=images, names=names)

    def paths(self) -> list[Path]:
        """Expand the globs: absolute paths, in order. A path that exists is taken as written.

        ValueError for a pattern without a match.
        """
        found = []
        for pattern in self.files:
            matches = [pattern] if os.path.exists(pattern) else sorted(glob(pattern, recursive=True))
            if not matches:
                raise ValueError(f"files: nothing fits {pattern}")
            found += [Path(path).resolve() for path in matches]
        if not found:
            raise ValueError("files: none given")
        return found


def open_records(
    name: str,
    source: RecordSource,
    reading: ReadOptions,
    quarantine: Path,
    steps: tuple[Callable, ...] = (),
    limit: Limit | None = None,
) -> Records:
    """Read a source's conversations, each passed through ``steps``. ValueError, with the name, if a file is missing."""
    try:
        files = source.paths()
        first = files[0] if files[0].is_dir() else files[0].parent
        root = Path(source.images).resolve() if source.images else first
        if not root.is_dir():
            raise ValueError(f"images={source.images}: no such folder")
        layout: Callable[..., RecordConversation]
        if source.names is None:
            layout = LAYOUTS[source.layout]
        else:
            layout = partial(imagenet, names=class_names(Path(source.names)))
        step = Import(layout, name, root, limit or Limit())
        return Records(file_parts(files, FORMATS[source.format]), [step, *steps], quarantine / name, reading)
    except (OSError, ValueError) as error:
        raise ValueError(f"source {name}: {error}") from error
