"""Plot a preference table: margins of rewards and of the reference policy (also per scale), sources and counts."""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vargpt_rl.data.pair_statistics import histogram, margins, repeats, scale_margins, sources


def plot_pairs(table: pd.DataFrame, path: Path) -> None:
    """Write a PNG for a table of one resolution with at least one pair."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    title = f"{len(table)} pairs of {table.prompt_id.nunique()} prompts at {table.resolution.iloc[0]} px"
    figure.suptitle(f"{title}\n{_counts(table)}", fontsize="medium")
    (reward, reference), (scales, shares) = figure.subplots(2, 2)
    by_kind = margins(table)
    _histogram(reward, by_kind.get("reward"), "reward margin", "no rewards")
    _histogram(reference, by_kind["reference"], "reference margin (nats)", "")
    by_scale = scale_margins(table)
    scales.bar(by_scale.index, by_scale)
    scales.set(xlabel="scale", title="mean reference margin by scale (nats)", xticks=by_scale.index)
    counts = pd.concat({side: sources(table, side) for side in ("rejected", "chosen")})
    bars = shares.barh([f"{side}: {name}" for side, name in counts.index], counts)
    shares.bar_label(bars, [f"{count / len(table):.0%}" for count in counts])
    shares.margins(x=0.15)  # room for the last label
    shares.set(xlabel="pairs", title="sources of images")
    figure.savefig(path, dpi=100)


def _counts(table: pd.DataFrame) -> str:
    """Count repeated prompts and images and, if the table records it, prompts without a chosen image."""
    repeated = ", ".join(f"{name} {count}" for name, count in repeats(table).items() if count)
    counts = [f"repeated: {repeated or 'nothing'}"]
    if "origin" in table.attrs:
        counts.append(f"prompts without chosen image: {table.attrs['origin']['prompts_without_winner']}")
    return "; ".join(counts)


def _histogram(axes: Axes, values: pd.Series | None, title: str, otherwise: str) -> None:
    axes.set_title(title)
    if values is None:
        axes.text(0.5, 0.5, otherwise, ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    axes.stairs(*histogram(values), fill=True)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_ylabel("pairs")
