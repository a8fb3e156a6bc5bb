"""Curves of the stages of a run, and remarks on what looks wrong in them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vargpt_rl.page.contents import RunContents
from vargpt_rl.page.figures import Figure, figure, line
from vargpt_rl.page.step_titles import step_title

WAITING = 0.1
"""Share of a step spent waiting for data above which it is remarked on."""
EARLY = 0.5
"""Share of the steps before which full accuracy is remarked on."""
EQUAL = 0.5
"""Share of groups with equal rewards above which it is remarked on."""
ROUNDING = 1e-9
"""Values below are rounding errors."""
PLOTS = (
    ("loss", "loss", (("loss", "loss"),)),
    ("margin on the trained pairs", "", (("rewards/margins", "margin"),)),
    ("accuracy on the trained pairs", "share", (("rewards/accuracies", "accuracy"),)),
    ("log-probability since the first step", "nats", (("logps/chosen", "chosen"), ("logps/rejected", "rejected"))),
    ("rewards of the policy's own images", "", (("reward", "reward"), ("judge", "judge"), ("diversity", "diversity"))),
    ("bit accuracy", "share", (("bit_accuracy", "bits right"),)),
    ("entropy of the policy", "nats a bit", (("entropy", "entropy"),)),
    ("KL divergence from the reference", "nats a bit", (("kl", "KL"),)),
)
"""Plots of a stage: title, unit, and keys of metrics with their names."""
FLAT = 1e-6
"""Losses that stay below are not plotted: a policy gradient's loss is 0 where the policy itself drew the images."""
SINCE_FIRST = "logps/"
"""Metrics with this beginning are shown as change since the first step."""
BY_SCALE = re.compile(r"rewards/margins/scale_(\d+)")


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure with its title and the text that says it without seeing it."""

    title: str
    figure: Figure
    text: str


@dataclass(kw_only=True)
class StageCurves:
    """Plots and remarks of one stage of an iteration."""

    title: str
    plots: list[Plot] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)


def all_curves(runs: list[RunContents]) -> list[StageCurves]:
    """Return the curves of every trained stage and resolution, those of two runs over each other."""
    found = []
    for key in dict.fromkeys(key for run in runs for key in _trained(run)):
        curves = _stage(runs, *key)
        if curves.plots:
            found.append(curves)
    return found


def _trained(run: RunContents) -> Iterator[tuple[int | None, str, int | None]]:
    """Yield iteration, stage and resolution of the metrics that have a loss or the rewards of an update."""
    for entry in run.metrics:
        if "loss" in entry or entry["stage"].endswith("/rollout"):
            yield entry.get("iteration"), entry["stage"], entry.get("resolution")


def _stage(runs: list[RunContents], iteration: int | None, stage: str, resolution: int | None) -> StageCurves:
    place = "" if iteration is None else f"iteration {iteration}: "
    size = f", {resolution} px" if resolution else ""
    series = [
        [entry for entry in run.series(iteration, stage) if entry.get("resolution") == resolution] for run in runs
    ]
    curves = StageCurves(title=f"{place}{step_title(stage)}{size}")
    several = len(runs) > 1
    for title, unit, keys in PLOTS:
        traces = []
        for number, (key, name) in enumerate(keys):
            for at, entries in enumerate(series):
                label = f"{runs[at].name}: {name}" if several else name
                traces += _trace(entries, key, label, number, at)
        if traces:
            curves.plots.append(_plot(title, unit, traces))
    traces = [
        trace
        for at, entries in enumerate(series)
        for number, key in enumerate(_scales(entries))
        for trace in _trace(entries, key, f"{f'{runs[at].name}: ' if several else ''}scale {number}", number, at)
    ]
    if traces:
        curves.plots.append(_plot("margin by scale", "", traces))
    for run, entries in zip(runs, series, strict=True):
        curves.flags += [f"{run.name}: {flag}" if several else flag for flag in flags(entries)]
    return curves


def _scales(entries: list[dict[str, Any]]) -> list[str]:
    keys = {key for entry in entries for key in entry if BY_SCALE.fullmatch(key)}
    return sorted(keys, key=lambda key: int(key.rpartition("_")[2]))


def _trace(entries: list[dict[str, Any]], key: str, name: str, number: int, run: int) -> list[dict[str, Any]]:
    points = [(entry["step"], entry[key]) for entry in entries if isinstance(entry.get(key), int | float)]
    if not points or (key == "loss" and all(abs(value) < FLAT for _, value in points)):
        return []
    first = points[0][1] if key.startswith(SINCE_FIRST) else 0.0
    return [line([step for step, _ in points], [value - first for _, value in points], name, number, run)]


def _plot(title: str, unit: str, traces: list[dict[str, Any]]) -> Plot:
    ends = [f"{_short(trace['y'][0])} to {_short(trace['y'][-1])}" for trace in traces]
    named = ends if len(traces) == 1 else [f"{trace['name']} {end}" for trace, end in zip(traces, ends, strict=True)]
    return Plot(title=title, figure=figure(traces, "step", unit), text=f"{title}: {'; '.join(named)}")


def _short(value: float) -> str:
    return "0" if abs(value) < ROUNDING else f"{value:.3g}"


def flags(entries: list[dict[str, Any]]) -> list[str]:
    """Return remarks on the metrics of a stage: what a practitioner would look at first."""
    told = []
    values = {
        key: [(entry["step"], entry[key]) for entry in entries if isinstance(entry.get(key), int | float)]
        for key in ("loss", "rewards/accuracies", "logps/chosen", "data_wait")
    }
    if any(value != value for _, value in values["loss"]):
        told.append("the loss is not a number at some step")
    accuracy = values["rewards/accuracies"]
    last = accuracy[-1][0] if accuracy else 0
    full = next((step for i, (step, _) in enumerate(accuracy) if all(value == 1 for _, value in accuracy[i:])), None)
    if full is not None and full <= EARLY * last:
        told.append(
            f"all trained pairs are told apart from step {full} of {last} on: "
            "fewer steps, a lower rate or harder pairs may do"
        )
    chosen = values["logps/chosen"]
    if chosen and chosen[-1][1] < chosen[0][1]:
        fall = chosen[0][1] - chosen[-1][1]
        told.append(f"the chosen images became less likely, by {fall:.0f} nats an image: both sides fall")
    waits = [value for _, value in values["data_wait"]]
    if waits and sum(waits) / len(waits) > WAITING:
        told.append(f"{sum(waits) / len(waits):.0%} of the time is spent waiting for data: raise data.workers")
    groups = [(entry.get("groups/equal", 0), entry["groups/drawn"]) for entry in entries if entry.get("groups/drawn")]
    equal = groups[-1][0] / groups[-1][1] if groups else 0.0
    if equal > EQUAL:
        told.append(f"in {equal:.0%} of the groups all images have the same reward: nothing is learned from them")
    return told
