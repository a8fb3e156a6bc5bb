"""Captions from a file, read row by row: JSON lines, CSV or Parquet.

A fault of the file is a ValueError that names the setting; a fault of one row is a `Reject` with its reason.
"""

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from heapq import nsmallest
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from vargpt_rl.common.wording import NO_TEXT
from vargpt_rl.data.instruct.dialogue import Caption, Reject, Unusable
from vargpt_rl.data.records.formats import FORMAT_OF, FORMATS, Fault, LeftOut, Row
from vargpt_rl.data.records.reader import file_parts

SPECIAL = re.compile(r"<image|<\|")


class Fields(NamedTuple):
    """The keys or columns of a record."""

    id: str
    caption: str
    image: str


def read_captions(path: Path, fields: Fields) -> Iterator[Caption | Reject]:
    """Read the captions of a file, in order. ValueError, before the first one, if the file or a column is missing."""
    if not path.is_file():
        raise ValueError(f"captions={path}: no such file")
    if path.suffix not in FORMAT_OF:
        raise ValueError(f"captions={path}: expected a file that ends in {', '.join(FORMAT_OF)}")
    columns = _columns(path)
    for setting, name in (("id_field", fields.id), ("caption_field", fields.caption)):
        if columns is not None and name not in columns:
            raise ValueError(f"{setting}={name}: no such column in {path}, expected one of {', '.join(columns)}")
    parts = file_parts([path], FORMATS[FORMAT_OF[path.suffix]])
    rows = ((part.place(number), row) for part in parts for number, row in part.read(0, 1))
    return (_caption(place, row, fields) for place, row in rows if not isinstance(row, LeftOut))


def drawn_at_random(
    read: Callable[[], Iterable[Caption | Reject]], count: int, seed: int
) -> Iterator[Caption | Reject]:
    """Sample ``count`` of the captions, in their order, by their ids and ``seed``; ``read`` is called twice.

    A larger ``count`` includes the captions of a smaller one. All rejects are kept.
    """
    ranks = ((_rank(caption.id, seed), caption.id) for caption in read() if isinstance(caption, Caption))
    chosen = {identity for _, identity in nsmallest(count, ranks)}
    return (caption for caption in read() if isinstance(caption, Reject) or caption.id in chosen)


def _rank(identity: str, seed: int) -> bytes:
    return blake2b(f"{seed} {identity}".encode(), digest_size=8).digest()


def _columns(path: Path) -> list[str] | None:
    """Return the columns of a table; None for JSON lines, where each row has keys of its own."""
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            return next(csv.reader(file), [])
    if path.suffix == ".parquet":
        try:
            return pq.read_schema(path).names
        except pa.ArrowInvalid as error:
            raise ValueError(f"captions={path}: not a Parquet file") from error
    return None


def _caption(source: str, row: Row | Fault, fields: Fields) -> Caption | Reject:
    identity = None
    try:
        if isinstance(row, Fault):
            raise Unusable(row.reason, row.found)
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


def _text(row: Row, name: str) -> str:
    """Return a value as text. Whole numbers are accepted: they are common as ids."""
    value = row.get(name)
    if value is None or value == "":
        raise Unusable(f"{name} is missing")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise Unusable(f"{name} is not text", repr(value))
    text = str(value)
    if NO_TEXT.search(text):
        raise Unusable(f"{name} has characters that are no text", repr(text))
    return text
