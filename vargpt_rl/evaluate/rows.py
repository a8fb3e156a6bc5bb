"""The rows of benchmark files: each is checked, what cannot be used is put down and counted."""

from collections.abc import Callable
from pathlib import Path

from vargpt_rl.data.quarantine import BadRecord, Quarantine
from vargpt_rl.data.records.formats import FORMATS, Fault
from vargpt_rl.evaluate.settings import EvaluateConfig

Check = Callable[[dict], None]
"""Raises BadRecord for a row that cannot be used."""


def read_rows(config: EvaluateConfig, key: str, check: Check) -> tuple[list[tuple[int, dict]], int]:
    """The usable lines of the JSON lines file under ``key``, numbered from 0 as in the file, and how many are bad.

    The first ``limit`` of them. ValueError where the file is missing, has nothing usable or too much that is bad.
    """
    path, quarantine = Path(getattr(config, key)), quarantine_of(config)
    if not path.is_file():
        raise ValueError(f"{key}={path}: no such file")
    rows, bad = sift(path, check, quarantine)
    if not rows:
        raise ValueError(f"{key}={path}: no usable line among {bad}\n{quarantine.table()}")
    quarantine.check(len(rows) + bad, config.max_bad_fraction, bad)
    return rows[: config.limit], bad


def sift(path: Path, check: Check, quarantine: Quarantine) -> tuple[list[tuple[int, dict]], int]:
    """The numbered lines of a JSON lines file that pass, and how many do not and are put down."""
    rows, bad = [], 0
    for number, row in FORMATS["jsonl"].read(path, 0, 0, 1):
        try:
            if isinstance(row, Fault):
                raise BadRecord(row.reason)
            check(row)
            rows.append((number, row))
        except BadRecord as fault:
            bad += 1
            quarantine.add(f"{path}:{number + 1}", row.found if isinstance(row, Fault) else str(row), str(fault))
    return rows, bad


def quarantine_of(config: EvaluateConfig) -> Quarantine:
    """Where this process puts bad rows down; every run of the command begins anew."""
    return Quarantine(config.folder / config.own("quarantine"))


def text(row: dict, key: str) -> str:
    """A value that must be words."""
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise BadRecord(f'"{key}" is missing' if key not in row else f'"{key}" is no text or empty')
    return value


def different(check: Check, key: str) -> Check:
    """``check``, and that no two rows have the same words under ``key``."""
    seen: set[str] = set()

    def both(row: dict) -> None:
        check(row)
        if row[key] in seen:
            raise BadRecord(f'"{key}" is that of an earlier line')
        seen.add(row[key])

    return both
