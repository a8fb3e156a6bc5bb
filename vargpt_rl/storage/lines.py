"""Records that are appended to a file line by line while work goes on, and read when it is taken up again."""

import json
import os
from pathlib import Path


def read_records(path: Path) -> list[dict]:
    """The JSON lines of a record, if there is one. A last line that was cut off while it was written is none.

    ValueError where the file is damaged otherwise.
    """
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.exists() else ""
    try:
        return [json.loads(line) for line in whole.split("\n")] if whole else []
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def trim(path: Path) -> None:
    """Cut a last line off that was not written to its end, so that the next one does not run into it."""
    if path.exists():
        before, newline, _ = path.read_bytes().rpartition(b"\n")
        os.truncate(path, len(before + newline))


def as_lines(records: list[dict]) -> str:
    """Records as JSON, one a line."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
