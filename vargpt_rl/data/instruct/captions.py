"""Captions from a file: JSON lines, CSV or Parquet, read a record at a time.

A fault of the file is a ValueError that names the setting; a fault of one record is a `Reject` with its reason.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from heapq import nsmallest
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from vargpt_rl.data.instruct.dialogue import Caption, Reject, Unusable

NO_TEXT = re.compile("[\0-\x1f\x7f\ud800-\udfff]")  # control characters, and half characters as JSON can spell them
SPECIAL = re.compile(r"<image|<\|")


class Fields(NamedTuple):
    """The keys or columns of a record."""

    id: str
    caption: str
    image: str


def read_captions(path: Path, fields: Fields) -> Iterator[Caption | Reject]:
    """The records of a file, in order. ValueError, before the first one, where the file or a column is missing."""
    if not path.is_file():
        raise ValueError(f"captions={path}: no such file")
    if path.suffix not in ROWS:
        raise ValueError(f"captions={path}: expected a file that ends in {', '.join(ROWS)}")
    columns = _columns(path)
    for setting, name in (("id_field", fields.id), ("caption_field", fields.caption)):
        if columns is not None and name not in columns:
            raise ValueError(f"{setting}={name}: no such column in {path}, expected one of {', '.join(columns)}")
    return (_caption(source, row, fields) for source, row in ROWS[path.suffix](path))


def drawn_at_random(
    read: Callable[[], Iterable[Caption | Reject]], count: int, seed: int
) -> Iterator[Caption | Reject]:
    """``count`` of the captions that ``read`` gives, twice, in their order; which ones follows from ids and ``seed``.

    Those of a larger ``count`` include those of a smaller one. Rejects are all given.
    """
    ranks = ((_rank(caption.id, seed), caption.id) for caption in read() if isinstance(caption, Caption))
    chosen = {identity for _, identity in nsmallest(count, ranks)}
    return (caption for caption in read() if isinstance(caption, Reject) or caption.id in chosen)


def _rank(identity: str, seed: int) -> bytes:
    return blake2b(f"{seed} {identity}".encode(), digest_size=8).digest()


def _columns(path: Path) -> list[str] | None:
    """The columns of a table; None for JSON lines, where each record has keys of its own."""
    if path.suffix == ".csv":
        with _open_csv(path) as file:
            return next(csv.reader(file), [])
    if path.suffix == ".parquet":
        try:
            return pq.read_schema(path).names
        except pa.ArrowInvalid as error:
            raise ValueError(f"captions={path}: not a Parquet file") from error
    return None


def _json_rows(path: Path) -> Iterator[tuple[str, dict | Unusable]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", _json_row(line)


def _json_row(line: bytes) -> dict | Unusable:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Unusable("not UTF-8", line.decode(errors="backslashreplace"))
    except (ValueError, RecursionError):
        return Unusable("not JSON", line.decode())
    return row if isinstance(row, dict) else Unusable("not a JSON object", line.decode())


def _open_csv(path: Path):
    return path.open(newline="", encoding="utf-8-sig", errors="surrogateescape")


def _csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    with _open_csv(path) as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                yield f"{path}:{reader.line_num}", row
        except csv.Error as error:
            raise ValueError(f"captions={path}: line {reader.line_num}: not CSV: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row


ROWS = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}


def _caption(source: str, row: dict | Unusable, fields: Fields) -> Caption | Reject:
    identity = None
    try:
        if isinstance(row, Unusable):
            raise row
        identity = _text(row, fields.id)
        caption = " ".join(_text(row, fields.caption).split())
        if not re.search(r"\w", caption):
            raise Unusable("caption without a word", caption)
        if SPECIAL.search(caption):
            raise Unusable("special token in the caption", caption)
        file = None if row.get(fields.image) in (None, "") else _text(row, fields.image)
    except Unusable as fault:
        return Reject(identity, source, fault.reason, fault.detail)
    return Caption(identity, caption, file, source)


def _text(row: dict, name: str) -> str:
    """A value as text; whole numbers are taken as well, for they are common as ids."""
    value = row.get(name)
    if value is None or value == "":
        raise Unusable(f"{name} is missing")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise Unusable(f"{name} is not text", repr(value))
    text = str(value)
    if NO_TEXT.search(re.sub(r"\s", " ", text)):
        raise Unusable(f"{name} has characters that are no text", repr(text))
    return text
