"""The file of dialogues, which an interrupted run resumes, and counts.

`vargpt_rl.storage.lines` does not serve: the file is locked, may be another program's, and can exceed the memory.
"""

import fcntl
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vargpt_rl.data.instruct.dialogue import Caption, Dialogue, Reject
from vargpt_rl.data.quarantine import Quarantine

IMAGE = "<image_gen>"
OPENING = b'{"id": '  # of every line, as `line` writes it
WRITTEN, KEPT, WITHOUT_PICTURE = "written", "already there", "written without an image file"


def record(caption: Caption, pair: Dialogue, method: str) -> dict[str, object]:
    """Return a dialogue in the layout of VARGPT's Fig. 15, with an id and what made it."""
    return {
        "id": caption.id,
        "messages": [
            {"role": "user", "content": pair.prompt},
            {"role": "assistant", "content": f"{pair.answer} {IMAGE}"},
        ],
        "images": [caption.file] if caption.file is not None else [],
        "task": "generation",
        "method": method,
        **pair.made_by,
    }


def line(content: dict[str, object]) -> bytes:
    """Format a record as a line of ASCII JSON."""
    return json.dumps(content).encode() + b"\n"


@contextmanager
def continued(path: Path) -> Iterator[tuple[BinaryIO, set[str]]]:
    """Open the file for appending; yield it and its ids. A truncated last line is removed.

    ValueError, and the file stays as it is, if it does not hold dialogues or another run is writing it.
    """
    with _open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"out={path}: another run is writing it") from error
        file.seek(0)
        ids, whole = set(), 0
        for number, content in enumerate(file, 1):
            if _is_torn(content):
                break
            identity = _identity(content, f"out={path}: line {number}")
            if content.endswith(b"\n"):
                ids.add(identity)
                whole += len(content)
        file.truncate(whole)
        yield file, ids


def _open(path: Path) -> BinaryIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+b")
    except OSError as error:
        raise ValueError(f"out={path}: {error.strerror}") from error


def _is_torn(content: bytes) -> bool:
    """Return whether ``content`` is a truncated line of this program."""
    if content.endswith(b"\n") or content[: len(OPENING)] != OPENING[: len(content)]:
        return False
    try:
        json.loads(content)
    except ValueError:
        return True
    return False


def _identity(content: bytes, where: str) -> str:
    try:
        written = json.loads(content)
        if written["task"] == "generation" and written["messages"]:
            return written["id"]
    except (ValueError, LookupError, TypeError):
        pass
    raise ValueError(f"{where} is not a dialogue of this program, expected a file of its own or a new one")


def fresh(captions: Iterable[Caption | Reject], ids: set[str], counts: Counter[str]) -> Iterator[Caption | Reject]:
    """Yield what is still to be done. Captions with one of ``ids`` are counted and left out; repeated ids rejected."""
    seen: set[str] = set()
    for caption in captions:
        if isinstance(caption, Reject):
            yield caption
            continue
        repeated = caption.id in seen
        seen.add(caption.id)
        if repeated:
            yield Reject(caption.id, caption.source, "id of an earlier record")
        elif caption.id in ids:
            counts[KEPT] += 1
        else:
            yield caption


def write(results: Iterable[dict | Reject], file: BinaryIO, rejects: Quarantine, counts: Counter[str]) -> None:
    """Write each result to its file at once, in order, and count it."""
    for result in results:
        if isinstance(result, Reject):
            rejects.add(result.source, " ".join(filter(None, (result.id, result.detail))), result.reason)
        else:
            file.write(line(result))
            file.flush()
            counts[WRITTEN] += 1
            counts[WITHOUT_PICTURE] += not result["images"]
