"""Read the rows of benchmark files; bad ones are quarantined and counted."""

from collections.abc import Callable
from pathlib import Path

from vargpt_rl.data.quarantine import BadRecord, Quarantine
from vargpt_rl.data.records.formats import FORMATS
from vargpt_rl.evaluate.settings import EvaluateConfig

Check = Callable[[dict], None]
"""Raises BadRecord for an unusable row."""


def read_rows(config: EvaluateConfig, key: str, check: Check) -> tuple[list[tuple[int, dict]], int]:
    """Read the JSON lines file of a key: the first ``limit`` usable lines with their numbers from 0, and the bad count.

    ValueError if the file is missing, has no usable line or too many bad ones.
    """
    path = Path(getattr(config, key))
    quarantine = quarantine_of(config)
    if not path.is_file():
        raise ValueError(f"{key}={path}: no such file")
    rows, bad = sift(path, check, quarantine)
    if not rows:
        raise ValueError(f"{key}={path}: expected at least one usable line, all {bad} are bad\n{quarantine.table()}")
    quarantine.check(len(rows) + bad, config.max_bad_fraction, bad)
    return rows[: config.limit], bad


def sift(path: Path, check: Check, quarantine: Quarantine) -> tuple[list[tuple[int, dict]], int]:
    """Return the numbered lines of a JSON lines file that pass the check, and the number of quarantined ones."""
    rows, bad = [], 0
    for number, row in FORMATS["jsonl"].read(path, 0, 0, 1):
        try:
            if not isinstance(row, dict):
                raise BadRecord(row.reason)
            check(row)
            rows.append((number, row))
        except BadRecord as fault:
            bad += 1
            quarantine.add(f"{path}:{number + 1}", str(row) if isinstance(row, dict) else row.found, str(fault))
    return rows, bad


def quarantine_of(config: EvaluateConfig) -> Quarantine:
    """Open this process's quarantine; every run of the command starts with an empty file."""
    return Quarantine(config.folder / config.own("quarantine"))


def text(row: dict, key: str) -> str:
    """Return a value that must be non-empty text."""
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise BadRecord(f'"{key}" is missing' if key not in row else f'"{key}" is not text or is empty')
    return value


def different(check: Check, key: str) -> Check:
    """Extend a check: no two rows may have the same ``key``."""
    seen: set[str] = set()

    def both(row: dict) -> None:
        check(row)
        if row[key] in seen:
            raise BadRecord(f'"{key}" repeats an earlier line')
        seen.add(row[key])

    return both
