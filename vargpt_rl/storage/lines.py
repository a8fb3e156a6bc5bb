"""JSON-lines files that are appended to during a run and read again on resume."""

import json
import os
from pathlib import Path


def read_records(path: Path) -> list[dict]:
    """Read the records of a file; an empty list if it does not exist. A truncated last line is ignored.

    Raises ValueError naming file and line if it is damaged elsewhere.
    """
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    records = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
        try:
            records.append(json.loads(line.decode("utf-8")))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is damaged in line {number}: {error.msg}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is damaged in line {number}: {error}") from error
    return records


def trim(path: Path) -> None:
    """Remove a truncated last line, so that the next record starts on a line of its own."""
    if path.exists():
        before, newline, _ = path.read_bytes().rpartition(b"\n")
        os.truncate(path, len(before + newline))


def as_lines(records: list[dict]) -> str:
    """Format records as JSON, one per line."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
