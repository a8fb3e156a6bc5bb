"""Completion of keys and of runs, for the shell."""

import difflib
import re
from collections.abc import Callable
from pathlib import Path

from vargpt_rl.common.fields import class_path, config_groups, dotted_fields, meaning

LOOP = "configs.schema:LoopConfig"
"""Settings of a run."""
AT = re.compile(r"at\.\d+\.")
"""Beginning of keys for one resolution."""
RUNS = Path("runs")
"""Folder of all runs, by default."""
STATE = "state.json"
"""File that every run has."""


def complete_keys(settings: tuple[str, ...]) -> Callable[[str], list[tuple[str, str]]]:
    """Return a function that completes the dotted keys of some classes, each with its meaning.

    Of a run's settings also keys below ``at.RESOLUTION``, groups of YAML files and their choices.
    """
    groups = config_groups() if LOOP in settings else {}

    def complete(incomplete: str) -> list[tuple[str, str]]:
        group, equals, begun = incomplete.partition("=")
        if equals:
            return [(f"{group}={name}", "") for name in groups.get(group, ()) if name.startswith(begun)]
        prefix = found.group() if groups and (found := AT.match(incomplete)) else ""
        fields = [pair for path in settings for pair in dotted_fields(class_path(path))]
        keys = [(f"{key}." if field.group else f"{key}=", meaning(field)) for key, field in fields]
        keys += [(f"{name}=", f"One of {', '.join(choices)}.") for name, choices in groups.items()]
        rest = incomplete.removeprefix(prefix)
        depth = rest.count(".")
        return [
            (prefix + key, doc) for key, doc in keys if key.startswith(rest) and key.rstrip(".").count(".") <= depth
        ]

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
