"""Readers of data files: JSON, JSON lines, CSV, Parquet, WebDataset tars, saved Hugging Face data sets, image folders.

A reader yields the rows of a file one by one and holds little more than one at a time. An unreadable row is replaced by
a `Fault`; so are all following rows if the rest of the file is lost. A `LeftOut` tells of something that is left out.
"""

import csv
import json
import os
import re
import reprlib
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from vargpt_rl.data.image_names import is_system_file
from vargpt_rl.data.records.columns import BATCH, array_size, dictionary_columns, group_size
from vargpt_rl.data.records.images import InArchive
from vargpt_rl.data.records.saved import NotAsSaved, check_saved

LONGEST = 16 * 2**20
"""Longest row of JSON, in characters or bytes, so that no damaged file fills the memory."""
BOM = b"\xef\xbb\xbf"
LARGEST_GROUP = 2**30
"""Most bytes of a Parquet row group, uncompressed."""
IMAGES = {".avif", ".bmp", ".gif", ".heic", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
DELIMITERS = ",;\t|"
"""Delimiters of CSV; spreadsheets write semicolons where the comma is the decimal point."""
FORMAT_OF = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "jsonl", ".parquet": "parquet"}
"""Formats by the endings of files."""
READ_MEMBERS = IMAGES | {".json", ".txt"}
"""Endings of the members of a tar that are read."""
_SIGNATURES = (
    (rb"\x1f\x8b", "compressed with gzip, expected it unpacked"),
    (rb"BZh[1-9]1AY&SY", "compressed with bzip2, expected it unpacked"),
    (rb"\xfd7zXZ", "compressed with xz, expected it unpacked"),
    (rb"\x28\xb5\x2f\xfd", "compressed with zstd, expected it unpacked"),
    (rb"PK\x03\x04", "a zip archive, expected it unpacked"),
    (rb"version https://git-lfs", "a git-lfs pointer, expected the file that `git lfs pull` fetches"),
)
_TEXT_SIGNATURES = (
    (rb"\xff\xfe\0\0|\0\0\xfe\xff|.\0\0\0|\0\0\0.", "encoded as UTF-32, expected UTF-8"),
    (rb"\xff\xfe|\xfe\xff|.\0|\0.", "encoded as UTF-16, expected UTF-8"),
    (rb"PAR1", "a Parquet file, expected text"),
)

Row = dict[str, Any]


class Fault(NamedTuple):
    """An unreadable row: why, and what was found."""

    reason: str
    found: str = ""


class LeftOut(NamedTuple):
    """Something of a row that is left out: why, and what it is. The row itself follows under the same number."""

    reason: str
    found: str


Rows = Iterator[tuple[int, Row | Fault | LeftOut]]


@dataclass(frozen=True)
class Format:
    """``parts(path)``: number of parts of a file that can be read on their own.

    ``rows(path, part, start, step)``: at least the rows start, start + step... of a part, each with its number.
    ``text``: whether a file is UTF-8. ``folder``: whether what is read is a folder of files.
    """

    parts: Callable[[Path], int]
    rows: Callable[[Path, int, int, int], Rows]
    text: bool = False
    folder: bool = False

    def check(self, path: Path) -> None:
        """ValueError, naming the file, for one that is compressed or of another kind, by its first bytes too."""
        if path.is_dir() != self.folder:
            raise ValueError(f"{path}: expected a {'folder' if self.folder else 'file'}")
        if self.folder:
            return
        if not path.is_file():
            raise ValueError(f"{path}: not a plain file")  # a pipe would block, a device never ends
        with path.open("rb") as file:
            head = file.read(64)
        for pattern, kind in _SIGNATURES + (_TEXT_SIGNATURES if self.text else ()):
            if re.match(pattern, head, re.DOTALL):
                raise ValueError(f"{path}: {kind}")

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
    return _line_rows(path, start, step) if _first_character(path) == b"{" else _array_rows(path)


def _jsonl_rows(path: Path, part: int, start: int, step: int) -> Rows:
    return _array_rows(path) if _first_character(path) == b"[" else _line_rows(path, start, step)


def _first_character(path: Path) -> bytes:
    """Return what tells an array from lines: both are found under the endings .json and .jsonl."""
    with path.open("rb") as file:
        return file.read(_CHUNK).removeprefix(BOM).lstrip()[:1]


def _array_rows(path: Path) -> Rows:
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
    return (item, end) if end < len(text) else None  # more digits of a number may follow


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


def _line_rows(path: Path, start: int, step: int) -> Rows:
    for number, line in islice(text_lines(path), start, None, step):
        if line is None:
            yield number, Fault(f"row of more than {LONGEST} bytes")
        elif line.strip():
            yield number, _parsed(line)


def text_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield the lines of a text file, each with its number from 0; None for one that is too long to be held."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST):
            if len(line) < LONGEST or line.endswith(b"\n"):
                yield number, line.removeprefix(BOM) if number == 0 else line
            else:
                while (rest := file.readline(LONGEST)) and not rest.endswith(b"\n"):
                    pass
                yield number, None
            number += 1


# CSV with a header, which tells the delimiter and whether blanks follow it; a first line "sep=;" (Excel's) says it too.
# Bytes that are not UTF-8 become half characters.

_SEPARATOR = re.compile(rf"sep=([{DELIMITERS}])\s*")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")


def _csv_rows(path: Path, part: int, start: int, step: int) -> Rows:
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        before, delimiter, head = -1, "", "\n"
        while head and not head.strip("\ufeff \t\r\n"):
            before, head = before + 1, file.readline(LONGEST)
            if named := _SEPARATOR.fullmatch(head):
                delimiter, head = named[1], "\n"
        delimiter = delimiter or max(DELIMITERS, key=head.count)
        spaced = all(name.startswith(" ") for name in head.split(delimiter)[1:])
        lines = chain([head], iter(lambda: file.readline(LONGEST), ""))
        reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=spaced, strict=True)
        names: list[str] | None = None
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:  # the reader goes on with the next line
                yield before + reader.line_num - 1, Fault(f"not CSV: {error}")
                continue
            if names is None:
                names = [name.strip("\ufeff ") for name in fields]
                if repeated := [name for name in names if name and names.count(name) > 1]:
                    yield before, Fault(f"file is lost: the header has {repeated[0]!r} more than once")
                    return
            elif fields:
                yield before + reader.line_num - 1, _csv_row(names, fields)


def _csv_row(names: list[str], fields: list[str]) -> Row | Fault:
    """Return a row. Fields that are missing at its end are None; surplus ones must be empty."""
    written = reprlib.repr(fields)
    if any(_NOT_UTF8.search(field) for field in fields):
        return Fault("not UTF-8", written)
    if any(fields[len(names) :]):
        return Fault(f"row of {len(fields)} fields, expected {len(names)}: one with delimiters must be quoted", written)
    return dict(zip_longest(names, fields[: len(names)]))


# Parquet: a part is a row group.


def _parquet_parts(path: Path) -> int:
    try:
        return pq.ParquetFile(path).num_row_groups
    except _UNREADABLE:
        return 1  # whose only row is the fault


def _parquet_rows(path: Path, part: int, start: int, step: int) -> Rows:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            if fault := _columns_fault(file.schema_arrow.names):
                yield 0, fault
                return
            in_dictionary = dictionary_columns(file, part)
            size = group_size(path, file, part, LARGEST_GROUP)
        if size > LARGEST_GROUP:
            yield 0, Fault(f"row group is lost: of {size} bytes or more, expected at most {LARGEST_GROUP}")
            return
        with pq.ParquetFile(path, read_dictionary=in_dictionary) as file:
            for batch in file.iter_batches(BATCH, row_groups=[part], use_threads=False):
                first = start - number if start >= number else (start - number) % step
                yield from ((number + at, row) for at, row in _arrow_rows(batch, range(first, batch.num_rows, step)))
                number += batch.num_rows
    except _UNREADABLE as error:
        yield number, Fault(f"rest of the row group is lost: Parquet cannot be read ({type(error).__name__})")


_UNREADABLE = (pa.ArrowException, OSError, ValueError)
"""Errors of damaged files; a ValueError for pages that cannot be found and names that are not UTF-8."""


def _columns_fault(names: list[str]) -> Fault | None:
    name, count = max(Counter(names).items(), key=lambda item: item[1], default=("", 0))
    return Fault(f"file is lost: it has column {name!r} more than once") if count > 1 else None


def _arrow_rows(batch: pa.RecordBatch, taken: Iterable[int]) -> Iterator[tuple[int, Row | Fault]]:
    """Yield rows, or the fault of one that is too long or has values that Python has no objects for."""
    checked = _arrow_size(batch) <= LONGEST
    for at in taken:
        if not checked and _arrow_size(batch.slice(at, 1)) > LONGEST:
            yield at, Fault(f"row of more than {LONGEST} bytes")
            continue
        columns = zip(batch.schema.names, batch.columns, strict=True)
        try:
            yield at, {name: column[at].as_py() for name, column in columns}
        except (pa.ArrowException, ArithmeticError, LookupError, ValueError) as error:
            yield at, Fault(f"row has a value that cannot be read ({type(error).__name__})")


def _arrow_size(batch: pa.RecordBatch) -> int:
    return sum(array_size(column, LONGEST) for column in batch.columns)


# Folders that `datasets.Dataset.save_to_disk` wrote. They are mapped into memory, not read into it.


def _saved_rows(path: Path, part: int, start: int, step: int) -> Rows:
    from datasets import load_from_disk  # takes a second, which other formats need not wait for

    try:
        check_saved(path)
        data = load_from_disk(str(path)).with_format("arrow")  # which leaves images encoded
    except NotAsSaved as error:
        yield 0, Fault(f"data set is lost: {error}")
        return
    except (*_UNREADABLE, AttributeError, LookupError, RecursionError, TypeError) as error:  # of its description
        yield 0, Fault(f"data set is lost: it cannot be read ({type(error).__name__})")
        return
    for first in range(start, len(data), step * BATCH):
        taken = range(first, min(first + step * BATCH, len(data)), step)
        for batch in data[taken].combine_chunks().to_batches():
            yield from zip(taken, (row for _, row in _arrow_rows(batch, range(batch.num_rows))), strict=True)


def _saved_parts(path: Path) -> int:
    if (path / "dataset_dict.json").is_file():
        raise ValueError(f"{path}: holds several splits, name the folder of one")
    return 1


# WebDataset: members of a tar that have their name up to the first dot in common are a row, wherever they lie. Its
# .json is the row, its images become "images" in the order of their names, its .txt "txt", the common name "__key__".
# Members of other kinds are noted, once for each archive and kind.


def _tar_rows(path: Path, part: int, start: int, step: int) -> Rows:
    number = 0
    noted: set[str] = set()
    try:
        with tarfile.open(path, "r:") as archive:
            groups, whole = _groups(archive)
            for number, (key, members) in enumerate(groups.items()):
                if number < start or (number - start) % step != 0:
                    continue
                for member in members:
                    kind = _kind(member)
                    if kind not in READ_MEMBERS and member.isreg() and kind not in noted:
                        noted.add(kind)
                        yield number, LeftOut(f"archive members of kind {kind!r} are not read", member.name)
                yield number, _sample(archive, path, key, members)
            number = len(groups)
            if not whole:
                raise tarfile.ReadError("breaks off")
    except (tarfile.TarError, OSError):
        yield number, Fault("rest of the archive is lost: it is damaged or breaks off")


def _groups(archive: tarfile.TarFile) -> tuple[dict[str, list[tarfile.TarInfo]], bool]:
    """Return the members by their keys, and whether the archive is whole; the last key of one that is not is left out.

    Files of the operating system are skipped. Of members of the same name the last one counts, as where tar unpacks.
    """
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    key = None
    try:
        for member in archive:
            if member.isdir() or is_system_file(PurePosixPath(member.name)):
                continue
            key = _key(member)
            groups.setdefault(key, {})[member.name] = member
        archive.fileobj.seek(archive.offset)  # tarfile takes a damaged header for the end
        whole = archive.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except (tarfile.TarError, OSError):
        whole = False
    if not whole and key is not None:
        del groups[key]
    return {key: list(members.values()) for key, members in groups.items()}, whole


def _key(member: tarfile.TarInfo) -> str:
    path = PurePosixPath(member.name)
    return str(path.with_name(path.name.partition(".")[0] or path.name))


def _kind(member: tarfile.TarInfo) -> str:
    return PurePosixPath(member.name).suffix.lower()


def _sample(archive: tarfile.TarFile, path: Path, key: str, members: list[tarfile.TarInfo]) -> Row | Fault:
    row: Row = {"__key__": key, "images": []}
    rows = [member.name for member in members if _kind(member) == ".json"]
    if len(rows) > 1:
        return Fault(f"{len(rows)} .json members have the name before the first dot in common", ", ".join(rows[:2]))
    for member in sorted(members, key=lambda member: member.name):
        kind = _kind(member)
        if not member.isreg():
            return Fault("archive member is not a plain file", member.name)
        if kind in IMAGES:
            row["images"].append(InArchive(path, member.offset_data, member.size))
        elif kind in READ_MEMBERS:
            if member.size > LONGEST:
                return Fault("archive member is too long", member.name)
            file = archive.extractfile(member)
            assert file is not None  # only members that are not plain files have no content
            data = file.read().removeprefix(BOM)
            if kind == ".txt":
                try:
                    row["txt"] = data.decode()
                except UnicodeDecodeError:
                    return Fault("archive member is not UTF-8", member.name)
                continue
            parsed = _parsed(data)
            if isinstance(parsed, Fault):
                return parsed
            row = parsed | row
    return row


# Folders of images by class: <folder>/<synset>/<image>. Rows alternate between the classes. Files of the operating
# system are skipped.


def _synset_rows(path: Path, part: int, start: int, step: int) -> Rows:
    folders = [name for name in _own_names(path) if (path / name).is_dir()]
    classes = ([(folder, name) for name in _own_names(path / folder)] for folder in folders)
    around = (found for turn in zip_longest(*classes) for found in turn if found is not None)
    for number, (folder, name) in islice(enumerate(around), start, None, step):
        yield number, {"synset": folder, "file": f"{folder}/{name}"}


def _own_names(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not is_system_file(PurePosixPath(name)))


FORMATS = {
    "csv": Format(_one, _csv_rows, text=True),
    "json": Format(_one, _json_rows, text=True),
    "jsonl": Format(_one, _jsonl_rows, text=True),
    "parquet": Format(_parquet_parts, _parquet_rows),
    "saved": Format(_saved_parts, _saved_rows, folder=True),
    "synsets": Format(_one, _synset_rows, folder=True),
    "webdataset": Format(_one, _tar_rows),
}
