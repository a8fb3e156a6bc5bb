"""Quarantine of bad records: each is written with its reason and counted, so none is skipped silently."""

import json
from collections import Counter
from pathlib import Path

from vargpt_rl.storage.lines import trim

LONGEST_RECORD = 500  # characters kept of a record


class BadRecord(ValueError):
    """A record that cannot be used. The message is the reason, worded so that equal faults have equal reasons."""


class Quarantine:
    """Bad records, appended to the JSON lines file ``path`` and counted by reason.

    ``counts`` has every record, ``lost`` the number of those that could not be used at all.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.counts: Counter[str] = Counter()
        self.lost = 0
        # A resumed run reads its data again; records found again are neither written nor counted twice.
        self._seen: set[str] = set()
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        """Count what earlier starts have found. ValueError naming the file and line if it is damaged."""
        if not self.path.is_file():
            raise ValueError(f"{self.path}: expected a file: move it away")
        trim(self.path)
        lines = self.path.read_bytes().split(b"\n")[:-1]
        for number, line in enumerate(lines, start=1):
            try:
                self._count(line.decode())
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"{self.path}, line {number} is damaged ({error}): remove it; data is judged again when it is read"
                ) from error

    def _count(self, line: str) -> None:
        record = json.loads(line)
        reason, lost = record["reason"], record["lost"]
        if not isinstance(reason, str) or not isinstance(lost, bool):
            raise ValueError("expected a reason, and whether the record is lost")
        self._seen.add(line)
        self.counts[reason] += 1
        self.lost += lost

    def add(self, source: str, record: str, reason: str, *, lost: bool = True) -> None:
        """Write ``record``, once. ``source`` is its file and line.

        ``lost`` is False for a mere note, such as a file that nothing refers to; `check` ignores it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"source": source, "reason": reason, "lost": lost, "record": record[:LONGEST_RECORD]})
        if line not in self._seen:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            self._count(line)

    def gather(self, folder: Path) -> int:
        """Add the records that other processes wrote to files below ``folder``; return the number of new ones."""
        known = len(self._seen)
        for path in sorted(Path(folder).rglob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                found = json.loads(line)
                self.add(found["source"], found["record"], found["reason"], lost=found["lost"])
        return len(self._seen) - known

    def table(self) -> str:
        """Format the counts, one reason a line, most frequent first."""
        return "\n".join(f"{count:8d}  {reason}" for reason, count in self.counts.most_common())

    def check(self, total: int, max_bad_fraction: float, lost: int | None = None) -> None:
        """Raise ValueError if more than ``max_bad_fraction`` of ``total`` records are lost.

        ``lost`` is their number; by default all lost records ever written.
        """
        lost = self.lost if lost is None else lost
        if lost > max_bad_fraction * total:
            raise ValueError(
                f"{lost} of {total} records are bad, more than the permitted share of {max_bad_fraction} "
                f"(each with its reason in {self.path}):\n{self.table()}"
            )
