"""Hashes of the files that the steps of a run leave, so that a damaged or vanished one is noticed before it is used."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vargpt_rl.storage.files import digest


class Manifest:
    """The files below ``root`` that match one of the globs, by relative path: the step that wrote each, and its hash.

    ``entries`` is plain data, kept by the caller. A file is hashed when it is new or its size or time changed.
    """

    def __init__(self, root: Path, globs: tuple[str, ...], entries: dict[str, dict[str, Any]]):
        self.root = root
        self.globs = globs
        self.entries = entries
        self._seen: dict[str, tuple[int, int]] = {}

    def record(self, step: str) -> None:
        """Enter the files that ``step`` wrote; drop those that are gone, as their step meant them for later ones."""
        found = {path.relative_to(self.root).as_posix(): path for path in self._files()}
        for name in self.entries.keys() - found.keys():
            del self.entries[name]
        for name, path in found.items():
            status = path.stat()
            stamp = status.st_size, status.st_mtime_ns
            if name not in self.entries or self._seen.get(name) != stamp:
                entry = {"bytes": status.st_size, "blake2b": digest(path)}
                if entry != {key: self.entries.get(name, {}).get(key) for key in entry}:
                    self.entries[name] = {"step": step, **entry}
                self._seen[name] = stamp

    def _files(self) -> Iterator[Path]:
        for pattern in self.globs:
            yield from (path for path in self.root.glob(pattern) if path.is_file() and not path.name.startswith("."))

    def problem(self, name: str) -> str | None:
        """Say what is wrong with a file; None if it is as its step left it. ``name`` is a key of the entries."""
        path, entry = self.root / name, self.entries[name]
        if not path.exists():
            return f"{path} is gone"
        if not path.is_file() or path.stat().st_size != entry.get("bytes") or digest(path) != entry.get("blake2b"):
            return f"{path} is damaged: it is not as {entry.get('step')} left it"
        status = path.stat()
        self._seen[name] = status.st_size, status.st_mtime_ns
        return None
