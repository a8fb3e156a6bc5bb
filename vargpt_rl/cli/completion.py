"""Completion of keys and of runs, for the shell."""

import difflib
from collections.abc import Callable
from pathlib import Path

from vargpt_rl.common.fields import class_path, dotted_fields, meaning

RUNS = Path("runs")
"""Folder of all runs, by default."""
STATE = "state.json"
"""File that every run has."""


def complete_keys(settings: tuple[str, ...]) -> Callable[[str], list[tuple[str, str]]]:
    """Return a function that completes the dotted keys of some classes, each with its meaning."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        found = [pair for path in settings for pair in dotted_fields(class_path(path))]
        keys = [(f"{key}." if field.group else f"{key}=", meaning(field)) for key, field in found]
        depth = incomplete.count(".")
        return [(key, doc) for key, doc in keys if key.startswith(incomplete) and key.rstrip(".").count(".") <= depth]

    return complete


def run_folders(runs: Path = RUNS) -> list[Path]:
    """Return the folders of runs, the latest first."""
    found = [path.parent for path in runs.glob(f"*/{STATE}")]
    return sorted(found, key=lambda folder: (folder / STATE).stat().st_mtime, reverse=True)


def complete_runs(incomplete: str) -> list[str]:
    """Complete the folder of a run."""
    return [str(folder) for folder in run_folders() if str(folder).startswith(incomplete)] + [
        folder.name for folder in run_folders() if incomplete and folder.name.startswith(incomplete)
    ]


def find_run(name: str) -> Path:
    """Return the folder of a run, given as a folder or by its name in ``runs``. ValueError if there is none."""
    for folder in (Path(name), RUNS / name):
        if (folder / STATE).is_file():
            return folder
    known = [str(folder) for folder in run_folders()]
    near = difflib.get_close_matches(name, [*known, *(Path(run).name for run in known)], n=1)
    if near:
        raise ValueError(f"{name}: there is no run here, did you mean {near[0]}?")
    raise ValueError(f"{name}: there is no run here, expected a folder with {STATE}, such as runs/NAME")
