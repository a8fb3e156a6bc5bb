"""Readers of data files: JSON, JSON lines, CSV, Parquet, WebDataset tars, saved Hugging Face data sets, image folders.

A reader yields the rows of a file one by one and holds little more than one at a time. An unreadable row is replaced by
a `Fault`; so are all following rows if the rest of the file is lost.
"""

import csv
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice, zip_longest
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_from_disk

from vargpt_rl.data.records.images import InArchive

LONGEST = 16 * 2**20
"""Longest row of JSON, in characters or bytes, so that no damaged file fills the memory."""
BATCH = 64
"""Rows that are converted to Python objects together."""
IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

Row = dict[str, Any]


class Fault(NamedTuple):
    """An unreadable row: why, and what was found."""

    reason: str
    found: str = ""


Rows = Iterator[tuple[int, Row | Fault]]


@dataclass(frozen=True)
class Format:
    """``parts(path)``: number of parts of a file that can be read on their own.

    ``rows(path, part, start, step)``: at least the rows start, start + step... of a part, each with its number.
    """

    parts: Callable[[Path], int]
    rows: Callable[[Path, int, int, int], Rows]

    def read(self, path: Path, part: int, start: int, step: int) -> Rows:
        """Yield the rows start, start + step, start + 2 * step, ... of a part, each with its number."""
        rows = self.rows(path, part, start, step)
        return ((number, row) for number, row in rows if number >= start and (number - start) % step == 0)


def _one(path: Path) -> int:
    return 1


def _object(item: object) -> Row | Fault:
    return item if isinstance(item, dict) else Fault(f"{type(item).__name__} where an object is expected", str(item))


# JSON. ijson would read arrays as well, but its memory grows with the square of the depth of nested lists: a file of
# 100 kB fills 20 GB. The decoder of the standard library refuses such a file.

_OPENING = {"[": re.compile(r"\s*\[\s*"), ",": re.compile(r"\s*,\s*")}
_CLOSING = {"[": re.compile(r"\s*\[\s*\]\s*"), ",": re.compile(r"\s*\]\s*")}
_DECODE = json.JSONDecoder().raw_decode
_CHUNK = 2**20


def _json_rows(path: Path, part: int, start: int, step: int) -> Rows:
    number = 0
    with path.open(encoding="utf-8-sig") as file:
        try:
            for item in _items(file):
                yield number, _object(item)
                number += 1
        except (ValueError, RecursionError) as error:
            yield number, Fault(f"rest of the file is lost: {_json_fault(error)}")


def _items(file: TextIO) -> Iterator[object]:
    """Yield the items of the JSON array in ``file``. Raises ValueError if it is none."""
    text, at, opening = "", 0, "["
    while True:
        chunk = file.read(max(_CHUNK, len(text) - at))
        text, at = text[at:] + chunk, 0
        while (found := _item(text, at, opening)) is not None:
            item, at = found
            opening = ","
            yield item
        if not chunk and not _CLOSING[opening].fullmatch(text, at):
            raise ValueError("not a JSON array, or one that breaks off")
        if len(text) - at > LONGEST:
            raise ValueError("not a JSON array, or a row that is too long")
        if not chunk:
            return


def _item(text: str, at: int, opening: str) -> tuple[object, int] | None:
    """Return the item after ``opening`` and its end, or None if ``text`` does not hold all of it."""
    before = _OPENING[opening].match(text, at)
    if before is None:
        return None
    try:
        item, end = _DECODE(text, before.end())
    except json.JSONDecodeError:
        return None
    return (item, end) if end < len(text) else None  # a number may go on


def _json_fault(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "not JSON: too deeply nested"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    return f"not JSON: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)


def _parsed(text: bytes) -> Row | Fault:
    try:
        return _object(json.loads(text.decode()))
    except (ValueError, RecursionError) as error:
        return Fault(_json_fault(error), text.decode(errors="backslashreplace").strip())


def _jsonl_rows(path: Path, part: int, start: int, step: int) -> Rows:
    with path.open("rb") as file:
        lines = enumerate(iter(lambda: file.readline(LONGEST), b""))
        for number, line in islice(lines, start, None, step):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
            if text.strip():
                yield number, _parsed(text)


# CSV with a header. Bytes that are not UTF-8 become half characters, which no text may have.


def _csv_rows(path: Path, part: int, start: int, step: int) -> Rows:
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                yield reader.line_num - 1, row
        except csv.Error as error:
            yield reader.line_num - 1, Fault(f"rest of the file is lost: not CSV: {error}")


# Parquet: a part is a row group.


def _parquet_parts(path: Path) -> int:
    try:
        return pq.ParquetFile(path).num_row_groups
    except (pa.ArrowException, OSError):
        return 1  # whose only row is the fault


def _parquet_rows(path: Path, part: int, start: int, step: int) -> Rows:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH, row_groups=[part], use_threads=False):
                first = start - number if start >= number else (start - number) % step
                for at in range(first, batch.num_rows, step):
                    yield number + at, {name: batch[name][at].as_py() for name in batch.schema.names}
                number += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        yield number, Fault(f"rest of the row group is lost: Parquet cannot be read ({type(error).__name__})")


# Folders that `datasets.Dataset.save_to_disk` wrote. They are mapped into memory, not read into it.


def _saved_rows(path: Path, part: int, start: int, step: int) -> Rows:
    try:
        data = load_from_disk(str(path)).with_format("arrow")  # which leaves images encoded
    except (pa.ArrowException, OSError) as error:
        yield 0, Fault(f"data set is lost: it cannot be read ({type(error).__name__})")
        return
    for first in range(start, len(data), step * BATCH):
        taken = range(first, min(first + step * BATCH, len(data)), step)
        yield from zip(taken, data[taken].to_pylist(), strict=True)


def _saved_parts(path: Path) -> int:
    if (path / "dataset_dict.json").is_file():
        raise ValueError(f"{path}: holds several splits, name the folder of one")
    return 1


# WebDataset: members of a tar that have their name up to the first dot in common are a row. Its .json is the row,
# its images become "images" in the order of their names, its .txt becomes "txt", the common name "__key__".


def _tar_rows(path: Path, part: int, start: int, step: int) -> Rows:
    number = 0
    try:
        with tarfile.open(path, "r:") as archive:
            for key, members in groupby(_members(archive), _key):
                group = list(members)
                if number >= start and (number - start) % step == 0:
                    yield number, _sample(archive, path, key, group)
                number += 1
    except (tarfile.TarError, OSError):
        yield number, Fault("rest of the archive is lost: it is damaged or breaks off")


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members. Raises ReadError if the end is missing: tarfile takes a damaged header for the end."""
    yield from (member for member in archive if not member.isdir())
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("no end")


def _key(member: tarfile.TarInfo) -> str:
    path = PurePosixPath(member.name)
    return str(path.with_name(path.name.partition(".")[0] or path.name))


def _sample(archive: tarfile.TarFile, path: Path, key: str, members: list[tarfile.TarInfo]) -> Row | Fault:
    row: Row = {"__key__": key, "images": []}
    for member in sorted(members, key=lambda member: member.name):
        suffix = PurePosixPath(member.name).suffix.lower()
        if not member.isreg():
            return Fault("archive member is not a plain file", member.name)
        if suffix in IMAGES:
            row["images"].append(InArchive(path, member.offset_data, member.size))
        elif suffix not in (".json", ".txt"):
            return Fault(f"archive member of unknown kind {suffix!r}", member.name)
        elif member.size > LONGEST:
            return Fault("archive member is too long", member.name)
        else:
            file = archive.extractfile(member)
            assert file is not None  # only members that are not plain files have no content
            if suffix == ".txt":
                row["txt"] = file.read().decode(errors="backslashreplace")
                continue
            parsed = _parsed(file.read())
            if isinstance(parsed, Fault):
                return parsed
            row = parsed | row
    return row


# Folders of images by class: <folder>/<synset>/<image>. Rows alternate between the classes.


def _synset_rows(path: Path, part: int, start: int, step: int) -> Rows:
    folders = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    classes = ([(folder, name) for name in sorted(os.listdir(path / folder))] for folder in folders)
    around = (found for turn in zip_longest(*classes) for found in turn if found is not None)
    for number, (folder, name) in islice(enumerate(around), start, None, step):
        yield number, {"synset": folder, "file": f"{folder}/{name}"}


FORMATS = {
    "csv": Format(_one, _csv_rows),
    "json": Format(_one, _json_rows),
    "jsonl": Format(_one, _jsonl_rows),
    "parquet": Format(_parquet_parts, _parquet_rows),
    "saved": Format(_saved_parts, _saved_rows),
    "synsets": Format(_one, _synset_rows),
    "webdataset": Format(_one, _tar_rows),
}
