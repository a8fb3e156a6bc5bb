"""Check a folder that `datasets.Dataset.save_to_disk` wrote before the library opens it.

The library opens whatever files the folder's state names, waits for pipes, and decompresses all of a file at once.
Source of the layout of messages: Arrow's flatbuffers, Message.fbs.
"""

import json
from pathlib import Path
from struct import error as StructError
from struct import unpack_from

import pyarrow as pa

STATE = "state.json"
LARGEST_STATE = 16 * 2**20
"""Bytes of the folder's state and description."""
_DICTIONARY = 2
"""Kind of a message with a dictionary, whose values are a record batch inside it."""


class NotAsSaved(ValueError):
    """A saved data set has a fault, which the message names."""


def check_saved(folder: Path) -> None:
    """NotAsSaved for a folder with files that are damaged, elsewhere, no plain files, or compressed inside."""
    for name in ("dataset_info.json", STATE):
        path = folder / name
        if not path.is_file() or path.stat().st_size > LARGEST_STATE:
            raise NotAsSaved(f"{name} is no plain file of at most {LARGEST_STATE} bytes")
    for name in _data_files(folder):
        path = folder / name
        if Path(name).name != name or not path.is_file():  # links are followed, as to images
            raise NotAsSaved(f"{name!r} is no plain file in its folder")
        if _is_compressed(path):
            raise NotAsSaved(f"{name!r} is compressed inside, expected as save_to_disk writes it")


def _data_files(folder: Path) -> list[str]:
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        names = [file["filename"] for file in state["_data_files"]]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise NotAsSaved(f"{STATE} names no data files ({type(error).__name__})") from error
    if not names or not all(isinstance(name, str) for name in names):
        raise NotAsSaved(f"{STATE} names no data files")
    return names


def _is_compressed(path: Path) -> bool:
    with pa.memory_map(str(path)) as source:
        try:
            messages = pa.ipc.MessageReader.open_stream(source)
            while True:
                if _has_compression(messages.read_next_message().metadata.to_pybytes()):
                    return True
        except StopIteration:
            return False
        except (pa.ArrowException, OSError, StructError) as error:
            raise NotAsSaved(f"{path.name!r} is damaged or breaks off ({type(error).__name__})") from error


def _has_compression(message: bytes) -> bool:
    """Tell whether the record batch of a message, or that of its dictionary, names a compression."""
    (root,) = unpack_from("<I", message, 0)
    kind, header = _field(message, root, 1), _follow(message, _field(message, root, 2))
    if kind is None or header is None:
        return False
    if message[kind] == _DICTIONARY:
        header = _follow(message, _field(message, header, 1))
    elif message[kind] != 3:
        return False
    return header is not None and _field(message, header, 3) is not None


def _field(message: bytes, table: int, number: int) -> int | None:
    """Return the place of a field of a flatbuffer's table, None if it has none."""
    fields = table - unpack_from("<i", message, table)[0]
    (size,) = unpack_from("<H", message, fields)
    at = 4 + 2 * number
    offset = unpack_from("<H", message, fields + at)[0] if at < size else 0
    return table + offset if offset else None


def _follow(message: bytes, place: int | None) -> int | None:
    return None if place is None else place + unpack_from("<I", message, place)[0]
