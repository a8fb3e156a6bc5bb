"""Training checkpoints on disk: completion markers, retention, and the checkpoint to resume from.

A checkpoint is a folder ``checkpoint-NNNNNN`` whose marker ``COMPLETE`` (JSON) holds the size and blake2b of each file.
``learners.resume`` renames it into place once complete. Imports no DeepSpeed, since the driver reads checkpoints too.
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from vargpt_rl.storage.checkpoint import MARKER
from vargpt_rl.storage.files import digest, write_atomically

LAYOUT = "layout.json"
"""File of the `Layout` that a checkpoint was saved with, and of the optimizer's number of updates."""


@dataclass(frozen=True)
class Layout:
    """Shares of a job's ranks, and the seed of their order. Only an equal layout resumes a checkpoint bit for bit."""

    ranks: int
    micro_batch: int
    zero: int
    seed: int
    """Seed of the order of supervised examples, which depends on ranks and micro-batches."""

    def reads_as(self, other: "Layout") -> bool:
        """Tell whether each rank reads the same examples in the other layout."""
        return (self.ranks, self.micro_batch) == (other.ranks, other.micro_batch)

    def shards_as(self, other: "Layout") -> bool:
        """Tell whether each rank owns the same parts of the optimizer's state in the other layout."""
        return (self.ranks, self.zero) == (other.ranks, other.zero)

    def differences(self, other: "Layout") -> str:
        """Return what differs from the other layout, in words; empty if nothing does."""
        names = {"ranks": "learner.ranks", "micro_batch": "micro_batch", "zero": "zero"}
        own, others = asdict(self), asdict(other)
        return ", ".join(
            f"{name}={own[key]} instead of {others[key]}" for key, name in names.items() if own[key] != others[key]
        )


def write_layout(folder: Path, layout: Layout, updates: int) -> None:
    """Write a checkpoint's layout and the optimizer's number of updates."""
    (folder / LAYOUT).write_text(json.dumps(asdict(layout) | {"updates": updates}))


def read_layout(folder: Path) -> tuple[Layout, int]:
    """Read a checkpoint's layout and the optimizer's number of updates."""
    found = json.loads((folder / LAYOUT).read_text())
    updates = found.pop("updates")
    return Layout(**found), updates


def _described(files: list[Path]) -> list[dict[str, int | str]]:
    """Size and blake2b of each file; hashing releases the GIL, so threads hash several files in parallel."""
    with ThreadPoolExecutor() as threads:
        return [
            {"bytes": path.stat().st_size, "blake2b": hashed}
            for path, hashed in zip(files, threads.map(digest, files), strict=True)
        ]


def mark(folder: Path) -> None:
    """Write the completion marker for all files in ``folder``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [str(path.relative_to(folder)) for path in files]
    write_atomically(folder / MARKER, json.dumps(dict(zip(names, _described(files), strict=True))).encode())


def check(folder: Path) -> None:
    """ValueError, naming the checkpoint, if it is incomplete or its bytes are not those that were written."""
    if not (folder / MARKER).is_file():
        raise ValueError(f"training checkpoint {folder}: incomplete, expected {MARKER}")
    expected = json.loads((folder / MARKER).read_text())
    missing = [name for name in (LAYOUT, *expected) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"training checkpoint {folder}: {missing[0]} is missing")
    for name, found in zip(expected, _described([folder / name for name in expected]), strict=True):
        if found != expected[name]:
            raise ValueError(f"training checkpoint {folder}: {name} is not what was written (size or blake2b differs)")


def last_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest good checkpoint in ``folder`` (None if there is none), and the faults of the newer ones."""
    refused = []
    for checkpoint in sorted(folder.glob("checkpoint-*"), reverse=True):
        try:
            check(checkpoint)
        except ValueError as error:
            refused.append(str(error))
        else:
            return checkpoint, refused
    return None, refused


def prune(folder: Path, last: int, every: int | None) -> None:
    """Keep the ``last`` newest checkpoints and those of every ``every``-th step; remove an emptied folder too."""
    found = sorted(folder.glob("checkpoint-*"))
    for old in found[: max(0, len(found) - last)]:
        if not (every and int(old.name.split("-")[1]) % every == 0):
            shutil.rmtree(old)
    if not last and not list(folder.glob("checkpoint-*")):
        shutil.rmtree(folder, ignore_errors=True)
