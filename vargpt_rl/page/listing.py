"""Runs as lines for a terminal: a list of them, and the settings in which two differ."""

from collections.abc import Sequence

from vargpt_rl.page.contents import RunContents
from vargpt_rl.page.images import mean_of, moments_of, size
from vargpt_rl.page.sections import duration, settings_section

HEADINGS = ("run", "status", "steps", "time", "last score")


def run_lines(runs: Sequence[RunContents]) -> list[str]:
    """Return a line for each run, aligned below headings: status, steps, time and the score measured last.

    Files that could not be read or used follow, a line for each.
    """
    rows = [HEADINGS, *map(_row, runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return lines + _problems(runs)


def _problems(runs: Sequence[RunContents]) -> list[str]:
    return [problem for run in runs for problem in run.problems]


def _row(run: RunContents) -> tuple[str, ...]:
    done = len(run.steps)
    steps = f"{done}/{'?' if run.planned is None else done + len(run.ahead)}"
    return run.name, run.status, steps, duration(run.state.get("seconds", 0.0)), last_score(run)


def last_score(run: RunContents) -> str:
    """Return the score that was measured last with its resolution and moment; "-" if there is none."""
    for stage in reversed(run.stages):
        for moment in reversed(moments_of(run, stage)):
            if found := mean_of(moment.images, "score"):
                return f"{found.mean:.3f} at {size(moment.resolution)}, {moment.title}"
    return "-"


def differing_settings(runs: Sequence[RunContents]) -> list[str]:
    """Return the settings in which two runs differ, or one run from its defaults, a line for each.

    Files that could not be read follow, a line for each.
    """
    section = settings_section(runs)
    return [f"{key}: {' -> '.join(values)}" for key, values in section.rows] + _problems(runs)
