"""The other sections of a page: head, pairs, time and events, settings."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from vargpt_rl.common.usage import command_line
from vargpt_rl.evaluate.wording import agreement
from vargpt_rl.page.contents import PairRow, RunContents
from vargpt_rl.page.curves import Plot
from vargpt_rl.page.figures import bars, columns, figure, histogram
from vargpt_rl.page.step_titles import step_title

PAIRS_SHOWN = 64
"""Pairs of an iteration in the gallery, at most."""
BAD_SHOWN = 20
"""Quarantined records that are listed, at most."""


@dataclass(frozen=True, kw_only=True)
class StepMark:
    """A step in the strip: done, now or ahead."""

    name: str
    state: str
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Head:
    """Name, status, progress and the command to resume or use a run."""

    name: str
    status: str
    strip: list[StepMark]
    done: int
    total: int | None
    """None if the settings do not tell."""
    seconds: float
    left: float | None
    """Estimated seconds left; None if there is nothing to estimate from."""
    seen: str
    """Time of the last line of metrics."""
    commands: list[str]
    facts: list[tuple[str, str]]


def head(run: RunContents) -> Head:
    """Describe where a run stands."""
    ahead = run.ahead
    marks = [StepMark(name=step_title(step), state="done", seconds=seconds_of(run, step)) for step in run.steps]
    current = "now" if run.status == "running" else "ahead"
    for i, step in enumerate(ahead):
        marks.append(StepMark(name=step_title(step), state=current if i == 0 else "ahead", seconds=None))
    return Head(
        name=run.name,
        status=run.status,
        strip=marks,
        done=len(run.steps),
        total=None if run.planned is None else len(marks),
        seconds=run.state.get("seconds", 0.0),
        left=_left(run),
        seen=time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.metrics[-1]["time"])) if run.metrics else "",
        commands=_commands(run),
        facts=_facts(run),
    )


def seconds_of(run: RunContents, step: str) -> float | None:
    """Return how long a step took, if that is recorded."""
    span = run.times.get(step)
    return span[1] - span[0] if span else None


def _left(run: RunContents) -> float | None:
    """Estimate the seconds left: a step ahead takes as long as the last one of its name, else as steps on average."""
    known = {step.rpartition("/")[2]: seconds for step in run.steps if (seconds := seconds_of(run, step)) is not None}
    if run.status != "running" or not known:
        return None
    average = sum(known.values()) / len(known)
    return sum(known.get(step.rpartition("/")[2], average) for step in run.ahead)


def _commands(run: RunContents) -> list[str]:
    if run.status == "complete":
        models = ["model", *(each["path"] for each in _best(run))]
        return [command_line("chat", f"checkpoint={run.folder}/{model}") for model in models]
    if run.status != "stopped":
        return []
    steps = ["pairs", "resume"] if run.waits_for_labels else ["resume"]
    return [command_line(step, run.folder) for step in steps]


def _best(run: RunContents) -> list[dict[str, Any]]:
    found = run.summary.get("best") or []
    return found if isinstance(found, list) else [found]


def _facts(run: RunContents) -> list[tuple[str, str]]:
    facts = [
        ("start", run.setting("checkpoint", str, "")),
        ("data", run.setting("data.kind", str, "")),
        ("sizes", ", ".join(f"{size} px" for size in run.setting("resolutions", list[int], []))),
        ("methods", ", ".join(run.setting("align.methods", list[str], []))),
        ("reward", run.setting("reward.path", str, "none")),
        ("seed", str(run.setting("seed", int, ""))),
    ]
    facts += [
        (f"best at {best['resolution']} px", f"{best['path']}: iteration {best['iteration']}, {best['value']:.3f}")
        for best in _best(run)
    ]
    return [(name, value) for name, value in facts if value] if run.config else []


# Pairs


@dataclass(frozen=True, kw_only=True)
class PairCard:
    """A pair of the gallery with its images."""

    row: PairRow
    chosen: str | None
    rejected: str | None


@dataclass(kw_only=True)
class PairSection:
    """The pairs of one iteration: those with images, histograms, and what became of all samples."""

    title: str
    cards: list[PairCard] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    counts: list[tuple[str, str]] = field(default_factory=list)


def pair_sections(runs: Sequence[RunContents]) -> list[PairSection]:
    """Return the pairs of each iteration of each run."""
    found = []
    for run in runs:
        for stage in run.stages:
            prefix = f"{run.name}, " if len(runs) > 1 else ""
            section = _pairs(run, stage, f"{prefix}{step_title(stage)}")
            if section.cards or section.plots or section.counts:
                found.append(section)
    return found


def _pairs(run: RunContents, stage: str, title: str) -> PairSection:
    section = PairSection(title=title)
    for row in run.pairs(stage, PAIRS_SHOWN):
        chosen, rejected = run.pair_images(stage, row.pair_id)
        if chosen and rejected:
            section.cards.append(PairCard(row=row, chosen=chosen, rejected=rejected))
    number = stage.rpartition("-")[2]
    lines = run.series(int(number), "pairs") if number.isdecimal() else []
    for key, unit in (("reward_margin", "reward"), ("reference_margin", "nats")):
        if lines and f"{key}/counts" in lines[-1]:
            section.plots.append(_histogram(lines[-1], key, unit))
    if lines:
        section.plots += _scales_and_sources(lines[-1])
    result = run.steps.get(f"{stage}/pair", {})
    result = result.get("pairs", result)  # with dpo.min_pairs, sampling is part of the step
    if "built" in result:
        section.counts = [
            ("built", str(result["built"])),
            ("dropped", str(result["dropped"])),
            *((reason, str(count)) for reason, count in result.get("dropped_by_reason", {}).items()),
            *((f"{name} agrees with people", agreement(found)) for name, found in result.get("people", {}).items()),
        ]
    return section


def _histogram(entry: dict[str, Any], key: str, unit: str) -> Plot:
    title = f"{key.replace('_', ' ')}, chosen less rejected"
    shown = figure([histogram(entry[f"{key}/counts"], entry[f"{key}/edges"], title, 0)], unit, "pairs")
    text = f"{title}: mean {entry[f'{key}/mean']:.3g}, above 0 in {entry[f'{key}/positive']:.0%} of the pairs"
    return Plot(title=title, figure=shown, text=text)


def _scales_and_sources(entry: dict[str, Any]) -> list[Plot]:
    """Plot the mean reference margin by scale, and where the images of both sides are from."""
    found = []
    if margins := [entry[key] for k in range(len(entry)) if (key := f"reference_margin/scale_{k}") in entry]:
        title = "reference margin by scale, chosen less rejected"
        text = f"{title}: {', '.join(f'{value:.3g}' for value in margins)} nats from the first scale on"
        found.append(Plot(title=title, figure=figure([columns(margins, title, 1)], "scale", "nats"), text=text))
    shares = [(key.removeprefix("source/"), 0.0, entry[key]) for key in entry if key.startswith("source/")]
    if shares:
        text = "; ".join(f"{name} {share:.0%}" for name, _, share in shares)
        axis = {"autorange": "reversed", "automargin": True}
        shown = figure([bars(shares, "of the pairs")], "share of pairs", "", yaxis=axis)
        found.append(Plot(title="sources of the images", figure=shown, text=f"sources: {text}"))
    return found


# Time and events


@dataclass(kw_only=True)
class TimeSection:
    """Time of a run's steps, its events, and the records that could not be used."""

    name: str
    plot: Plot | None
    facts: list[tuple[str, str]]
    events: list[str]
    quarantined: list[dict[str, Any]]
    problems: list[str]


def time_section(run: RunContents) -> TimeSection:
    """Describe the time and the events of a run."""
    swaps = [line for line in run.metrics if line["stage"] == "swap"]
    speeds = [line["images_per_second"] for line in run.metrics if line.get("images_per_second")]
    facts = [
        ("time", duration(run.state.get("seconds", 0.0))),
        ("weight swaps", str(len(swaps)) if swaps else ""),
        ("swap", f"{sum(line['seconds'] for line in swaps) / len(swaps):.2f} s on average" if swaps else ""),
        ("sampling", ", ".join(f"{speed:.1f} images/s" for speed in speeds)),
        ("restarts", str(run.state.get("restarts", ""))),
    ]
    return TimeSection(
        name=run.name,
        plot=_gantt(run),
        facts=[(name, value) for name, value in facts if value],
        events=[str(event) for event in run.state.get("events", [])],
        quarantined=_quarantined(run),
        problems=run.problems,
    )


def _gantt(run: RunContents) -> Plot | None:
    """Plot the steps over time: by their records, else by the first and last metrics of each stage."""
    spans = {step: (span[0], span[1]) for step, span in run.times.items() if step in run.steps}
    if not spans:
        for entry in [entry for entry in run.metrics if "loss" in entry]:
            name = f"{entry['stage']} {entry.get('resolution') or ''}".strip()
            begin = spans.get(name, (entry["time"],))[0]
            spans[name] = (begin, entry["time"])
    spans = {name: (begin, end) for name, (begin, end) in spans.items() if end - begin >= 0.5}
    if not spans:
        return None
    start = min(begin for begin, _ in spans.values())
    rows = [(name, begin - start, end - begin) for name, (begin, end) in spans.items()]
    longest = sorted(rows, key=lambda row: -row[2])[:3]
    text = f"longest: {'; '.join(f'{step_title(name)} {duration(length)}' for name, _, length in longest)}"
    reversed_axis = {"autorange": "reversed", "automargin": True}
    shown = figure([bars(rows, "s")], "seconds", "", yaxis=reversed_axis, height=120 + 18 * len(rows))
    return Plot(title="steps over time", figure=shown, text=text)


def _quarantined(run: RunContents) -> list[dict[str, Any]]:
    path = run.folder / "quarantine.jsonl"
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[:BAD_SHOWN]:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            found.append({str(key): str(value)[:300] for key, value in entry.items()})
    return found


def duration(seconds: float) -> str:
    """Format seconds for people: 42 s, 7 min 5 s, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


# Settings


@dataclass(frozen=True, kw_only=True)
class SettingsSection:
    """Settings of the runs: those that differ, each with its values, and everything as YAML."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]
    everything: list[tuple[str, str]]


def settings_section(runs: Sequence[RunContents]) -> SettingsSection:
    """Compare two runs with each other, one with the defaults, as far as they are known."""
    if len(runs) > 1:
        title, columns, sides = "settings that differ", [run.name for run in runs], [run.config for run in runs]
    else:
        title, columns = "settings that differ from the defaults", ["default", "here"]
        sides = [runs[0].defaults or runs[0].config, runs[0].config]
    flat = [flatten(side) for side in sides]
    keys = dict.fromkeys(key for side in flat for key in side)
    rows = [(key, [side.get(key, "-") for side in flat]) for key in keys if len({side.get(key) for side in flat}) > 1]
    return SettingsSection(
        title=title,
        columns=columns,
        rows=rows,
        everything=[(run.name, yaml.safe_dump(run.config, sort_keys=False)) for run in runs if run.config],
    )


def flatten(settings: Any, prefix: str = "") -> dict[str, str]:
    """Return settings by dotted key, their values as JSON."""
    if not isinstance(settings, dict):
        return {prefix: json.dumps(settings)}
    found: dict[str, str] = {}
    for key, value in settings.items():
        found |= flatten(value, f"{prefix}.{key}".lstrip("."))
    return found or {prefix: "{}"} if prefix else found
