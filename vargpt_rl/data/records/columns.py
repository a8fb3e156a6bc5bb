"""Bytes that rows of Arrow and Parquet take, known before they are made.

A Parquet file's footer gives sums that its writer could choose; the headers of its pages are what a decoder goes by.
Source of their layout: the Thrift definition of Parquet and Thrift's compact protocol.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

BATCH = 64
"""Rows that are decoded together."""
OBJECT = 64
"""Bytes of a Python object beside its content."""
_LEAST_PAGE = 1024
"""Bytes that a page counts as at least, so that walking through empty ones ends."""
_DEEPEST = 4
"""Structures within each other in the header of a page."""
_SIZE, _COMPRESSED, _DATA, _DICTIONARY, _DATA_V2 = 2, 3, 5, 7, 8
"""Fields of a page's header; field 1 of the last three is the number of values."""


@dataclass(frozen=True)
class Page:
    """``size``: bytes, decompressed. ``values``: how many it has, those of repeated fields included."""

    size: int
    values: int


def dictionary_columns(file: pq.ParquetFile, part: int) -> list[str]:
    """Return the paths of the columns of texts and bytes whose values can stay in a dictionary until they are read.

    A page of a few bytes can repeat one large value.
    """
    columns = [file.schema.column(index) for index in range(len(file.schema))]
    group = file.metadata.row_group(part)
    if group.num_columns != len(columns):
        raise ValueError(f"{group.num_columns} columns, expected {len(columns)}")
    encodings = [group.column(index).encodings for index in range(len(columns))]
    return [
        column.path
        for column, used in zip(columns, encodings, strict=True)
        if column.physical_type == "BYTE_ARRAY" and not _is_delta(used)
    ]


def group_size(path: Path, file: pq.ParquetFile, part: int, enough: int) -> int:
    """Return the bytes of a decoded row group, or a number above ``enough``.

    They are what its pages hold, and eight for each value or its absence; for values of a fixed length that length.
    Pages that can repeat values and are not read as a dictionary count as if each value of a batch were a whole page,
    held twice. ValueError if the pages cannot be found.
    """
    in_dictionary = dictionary_columns(file, part)
    group = file.metadata.row_group(part)
    total = 0
    with path.open("rb") as source:
        for index in range(group.num_columns):
            column = file.schema.column(index)
            width = max(8, column.length or 0) if column.physical_type == "FIXED_LEN_BYTE_ARRAY" else 8
            expands = column.physical_type == "BYTE_ARRAY" and column.path not in in_dictionary
            largest = values = 0
            for page in _pages(source, group.column(index)):
                total += max(page.size, _LEAST_PAGE) + page.values * width
                largest = max(largest, page.size)
                values += page.values
                if total > enough:
                    return total
            if expands and "DELTA_LENGTH_BYTE_ARRAY" not in group.column(index).encodings:
                total += 2 * largest * (values if column.max_repetition_level else min(values, BATCH))
    return total


def _is_delta(encodings: tuple[str, ...]) -> bool:
    """Tell whether Arrow cannot keep such values in a dictionary. Writers of version 2 encode texts like this."""
    return any(encoding.startswith("DELTA_") for encoding in encodings)


def _pages(source: BinaryIO, column: pq.ColumnChunkMetaData) -> Iterator[Page]:
    at = column.data_page_offset
    if column.dictionary_page_offset:
        at = min(at, column.dictionary_page_offset)
    end = at + column.total_compressed_size
    while at < end and column.num_values:
        source.seek(at)
        header = _structure(source)
        size, compressed = header.get(_SIZE), header.get(_COMPRESSED)
        if not isinstance(size, int) or not isinstance(compressed, int) or size < 0 or compressed < 0:
            raise ValueError("a page without a size")
        inner = header.get(_DATA) or header.get(_DATA_V2) or header.get(_DICTIONARY)
        values = inner.get(1) if isinstance(inner, dict) else 0
        yield Page(size, values if isinstance(values, int) and values > 0 else 0)
        at = source.tell() + compressed


_Fields = dict[int, "int | _Fields"]


def _structure(source: BinaryIO, depth: int = 0) -> _Fields:
    """Read a structure of Thrift's compact protocol: its numbers and structures by their field; texts are skipped."""
    if depth > _DEEPEST:
        raise ValueError("structures too deep")
    fields: _Fields = {}
    field = 0
    while head := _byte(source):
        field = field + (head >> 4) if head >> 4 else _number(source)
        kind = head & 15
        if kind in (1, 2):  # a flag, whose value is its kind
            fields[field] = int(kind == 1)
        elif kind == 3:
            fields[field] = _byte(source)
        elif kind in (4, 5, 6):
            fields[field] = _number(source)
        elif kind == 8:
            source.seek(_unsigned(source), 1)
        elif kind == 12:
            fields[field] = _structure(source, depth + 1)
        else:
            raise ValueError(f"a field of kind {kind}")
    return fields


def _byte(source: BinaryIO) -> int:
    read = source.read(1)
    if not read:
        raise ValueError("breaks off")
    return read[0]


def _unsigned(source: BinaryIO) -> int:
    number = 0
    for shift in range(0, 64, 7):
        byte = _byte(source)
        number |= (byte & 127) << shift
        if byte < 128:
            return number
    raise ValueError("a number of more than 64 bits")


def _number(source: BinaryIO) -> int:
    coded = _unsigned(source)
    return (coded >> 1) ^ -(coded & 1)


def array_size(values: pa.Array, enough: int) -> int:
    """Return the bytes of an array's values as Python objects would hold them, or a number above ``enough``.

    The objects are not made.
    """
    kind = values.type
    if isinstance(values, pa.ExtensionArray):
        return array_size(values.storage, enough)
    if pa.types.is_primitive(kind):
        return 8 * len(values)
    objects = OBJECT * len(values)
    return objects if objects > enough else objects + _content_size(values, enough)


def _content_size(values: pa.Array, enough: int) -> int:
    kind = values.type
    if pa.types.is_dictionary(kind):
        if _is_text(kind.value_type):
            return _total(pc.binary_length(values.dictionary).take(values.indices))
        return len(values) * array_size(values.dictionary, enough)
    if _is_text(kind):
        return _total(pc.binary_length(values))
    if pa.types.is_binary_view(kind) or pa.types.is_string_view(kind):
        return sum(value.as_buffer().size for value in values if value.is_valid)
    if pa.types.is_fixed_size_binary(kind):
        return kind.byte_width * len(values)
    if pa.types.is_struct(kind):
        return sum(array_size(inside, enough) for inside in values.flatten())
    if pa.types.is_map(kind):
        return sum(array_size(value.values, enough) for value in values if value.is_valid)
    if pa.types.is_nested(kind) and not pa.types.is_union(kind):
        return array_size(values.flatten(), enough)
    return 0


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    return any(
        named(kind) for named in (types.is_binary, types.is_large_binary, types.is_string, types.is_large_string)
    )


def _total(lengths: pa.Array) -> int:
    return pc.sum(lengths).as_py() or 0
