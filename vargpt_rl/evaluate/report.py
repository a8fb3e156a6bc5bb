"""Report a benchmark as a JSON file and a Markdown table, which also has the rows that the papers report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from vargpt_rl.common.averages import interval, mean_and_error
from vargpt_rl.storage.files import write_atomically

REPORTED = Path(__file__).parent / "reported.yaml"


@dataclass
class Scores:
    """A checkpoint's results on a benchmark."""

    metrics: dict[str, float]
    """Values by metric."""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95 % confidence intervals of the metrics that have one: Wilson's of shares, Student's t of other means."""
    counts: dict[str, int] = field(default_factory=dict)
    """Numbers of images, questions and so on that the metrics are computed from."""
    details: dict[str, Any] = field(default_factory=dict)
    """Further results, for the JSON file only."""
    notes: list[str] = field(default_factory=list)
    """Remarks below the table."""


def summarise(
    groups: Mapping[str, Sequence[float]], prompts: Mapping[str, Sequence[str]] | None = None
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Return the mean of each group and the intervals of those that have one.

    ``prompts`` are those of the values of groups that have several images of a prompt, which are not independent.
    """
    known = prompts or {}
    means = {name: mean_and_error(values)[0] for name, values in groups.items()}
    bounds = {name: interval(values, known.get(name)) for name, values in groups.items()}
    return means, {name: found for name, found in bounds.items() if found}


@dataclass(frozen=True)
class Column:
    """A column of the table: a metric, its heading and its number of decimals."""

    metric: str
    heading: str
    decimals: int = 2


@cache
def reported(benchmark: str) -> dict:
    """Return the papers' results for a benchmark: "source", "note" and "rows" (metrics by method, may be empty)."""
    return yaml.safe_load(REPORTED.read_text(encoding="utf-8")).get(benchmark, {"source": "", "note": "", "rows": {}})


def comparable(benchmark: str, measured: list[str]) -> dict:
    """Keep those of the papers' rows that have one of these metrics."""
    published = reported(benchmark)
    rows = {name: metrics for name, metrics in published["rows"].items() if set(metrics) & set(measured)}
    return {**published, "rows": rows}


def table(columns: list[Column], rows: dict[str, Scores], published: dict) -> str:
    """Format as Markdown: a row per checkpoint, then the reported rows; a dash means no value."""
    lines = [["", *(column.heading for column in columns)], ["---", *("---:" for _ in columns)]]
    for name, scores in rows.items():
        lines.append([name, *(_cell(column, scores.metrics, scores.intervals) for column in columns)])
    for name, metrics in published["rows"].items():
        lines.append([f"{name} (reported)", *(_cell(column, metrics, {}) for column in columns)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _cell(column: Column, metrics: dict[str, float], intervals: dict[str, tuple[float, float]]) -> str:
    if column.metric not in metrics:
        return "-"
    value = f"{metrics[column.metric]:.{column.decimals}f}"
    if column.metric not in intervals:
        return value
    low, high = (f"{bound:.{column.decimals}f}" for bound in intervals[column.metric])
    return f"{value} ({low} to {high})"


def _numbers(columns: list[Column], rows: dict[str, Scores]) -> list[str]:
    """Say of how many images or answers each value is, once if that is the same for all checkpoints."""
    told = {}
    for name, scores in rows.items():
        known = [f"{each.heading} {scores.counts[each.metric]}" for each in columns if each.metric in scores.counts]
        told[name] = ", ".join(known)
    if len(set(told.values())) == 1:
        return [f"n: {text}." for text in set(told.values()) if text]
    return [f"n of {name}: {text}." for name, text in told.items() if text]


def write_report(
    folder: Path, benchmark: str, *, settings: dict, columns: list[Column], rows: dict[str, Scores], models: dict
) -> str:
    """Write ``folder``/benchmark.json and .md; return the Markdown. ``models`` describes the checkpoint of each row."""
    measured = list(dict.fromkeys(metric for scores in rows.values() for metric in scores.metrics))
    used = [column for column in columns if column.metric in measured]
    used += [Column(metric, metric) for metric in measured if metric not in {column.metric for column in columns}]
    published = comparable(benchmark, measured)
    notes = [*_numbers(used, rows), *dict.fromkeys(note for scores in rows.values() for note in scores.notes)]
    if published["rows"]:
        notes.append(f"Reported rows are the papers' own numbers: {published['source']}. {published['note']}")
    text = f"# {benchmark}\n\n{table(used, rows, published)}" + "".join(f"\n{note}\n" for note in notes)
    content = {
        "benchmark": benchmark,
        "settings": settings,
        "measured": [{**models[name], **asdict(scores)} for name, scores in rows.items()],
        "reported": published,
    }
    write_atomically(folder / f"{benchmark}.json", json.dumps(content, indent=2, ensure_ascii=False).encode())
    write_atomically(folder / f"{benchmark}.md", text.encode())
    return text
