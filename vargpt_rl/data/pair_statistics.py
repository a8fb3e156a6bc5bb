"""Statistics of a preference table: margins, origins of its images, and duplicates.

Margins are chosen minus rejected, of rewards and of the reference policy's log-probabilities (nats). `vargpt_rl.data.
preferences` has the columns.
"""

from itertools import pairwise

import numpy as np
import pandas as pd

BINS = 20
BAR = 40
"""Characters of the longest bar of a histogram in text."""

REPEATED = {
    "pair id": ["pair_id"],
    "prompt": ["prompt"],
    "chosen image": ["prompt_id", "chosen_bits"],
    "rejected image": ["prompt_id", "rejected_bits"],
    "pair of images": ["prompt_id", "chosen_bits", "rejected_bits"],
}
"""Kinds of duplicates, and the columns that are equal in them."""


def margins(table: pd.DataFrame) -> dict[str, pd.Series]:
    """Return margins by pair: ``reference``, and ``reward`` of the pairs with two rewards, if there are any."""
    found = {"reference": table.reference_chosen_logp - table.reference_rejected_logp}
    reward = (table.chosen_reward - table.rejected_reward).astype(float).dropna()
    return ({"reward": reward} if len(reward) else {}) | found


def histogram(values: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Return counts and the edges of their bins, one more than counts."""
    return np.histogram(values, bins=BINS)


def scale_margins(table: pd.DataFrame) -> pd.Series:
    """Return the mean reference margin by scale. ValueError unless all images have the same number of scales."""
    sides = [np.array(table[f"reference_{side}_by_scale"].tolist(), dtype=object) for side in ("chosen", "rejected")]
    if any(side.ndim != 2 for side in sides) or sides[0].shape != sides[1].shape:
        raise ValueError("images of one resolution differ in how many scales their log-probabilities have")
    return pd.Series((sides[0] - sides[1]).astype(float).mean(axis=0))


def sources(table: pd.DataFrame, side: str) -> pd.Series:
    """Count the images of ``side`` by origin: a checkpoint, or the folder or style of a winner's key."""
    names, drawn = table[f"{side}_source"], table[f"{side}_seed"].notna()
    return names.where(drawn, names.str.split("/").str[0]).value_counts()


def repeats(table: pd.DataFrame) -> dict[str, int]:
    """Count rows that repeat an earlier one, by kind, and rows with the same image on both sides."""
    counts = {name: int(table.duplicated(columns).sum()) for name, columns in REPEATED.items()}
    return counts | {"image on both sides": int((table.chosen_bits == table.rejected_bits).sum())}


def statistics(table: pd.DataFrame) -> dict[str, float | list[float]]:
    """Return all of the above under flat names, for one resolution and at least one pair; histograms are lists."""
    found: dict[str, float | list[float]] = {"pairs": len(table), "prompts": int(table.prompt_id.nunique())}
    for name, values in margins(table).items():
        counts, edges = histogram(values)
        found |= {f"{name}_margin/{key}": float(getattr(values, key)()) for key in ("mean", "median", "min", "max")}
        found |= {
            f"{name}_margin/positive": float((values > 0).mean()),
            f"{name}_margin/counts": counts.tolist(),
            f"{name}_margin/edges": edges.tolist(),
        }
    found |= {f"reference_margin/scale_{k}": value for k, value in scale_margins(table).items()}
    for side in ("chosen", "rejected"):
        found |= {f"source/{side}/{name}": count / len(table) for name, count in sources(table, side).items()}
    found |= {f"repeated/{name}": count for name, count in repeats(table).items()}
    origin = table.attrs.get("origin", {})
    found |= {key: origin[key] for key in ("samples", "prompts_without_winner") if key in origin}
    return found | {f"dropped/{reason}": count for reason, count in origin.get("dropped_by_reason", {}).items()}


def _bars(counts: np.ndarray, edges: np.ndarray) -> str:
    """Format the bins that are not empty as lines with a bar."""
    rows = [(f"{low:.4g} to {high:.4g}", int(n)) for n, (low, high) in zip(counts, pairwise(edges), strict=True) if n]
    width = max(len(name) for name, _ in rows)
    longest = max(n for _, n in rows)
    return "\n".join(f"{name:{width}} {n:6} {'#' * max(1, round(BAR * n / longest))}" for name, n in rows)


def describe(table: pd.DataFrame) -> str:
    """Format the statistics as text, by resolution. ValueError as in `scale_margins`."""
    if table.empty:
        return "0 pairs"
    blocks = []
    for resolution, part in table.groupby("resolution"):
        blocks.append(f"{len(part)} pairs of {part.prompt_id.nunique()} prompts at {resolution} px")
        by_kind = margins(part)
        blocks.append("margin, chosen - rejected\n" + pd.DataFrame(by_kind).describe().T.round(4).to_string())
        for name, values in by_kind.items():
            counts, edges = histogram(values)
            blocks.append(f"{name} margin\n{_bars(counts, edges)}")
        blocks.append("reference margin by scale\n" + scale_margins(part).round(4).to_string())
        for side in ("chosen", "rejected"):
            counts = sources(part, side)
            shares = pd.DataFrame({"pairs": counts, "share": (counts / len(part)).round(4)})
            blocks.append(f"{side} from\n{shares.rename_axis(None).to_string()}")
        blocks.append("more than once\n" + pd.Series(repeats(part)).to_string())
    if origin := table.attrs.get("origin"):
        totals = {key.replace("_", " "): origin[key] for key in ("samples", "prompts", "prompts_without_winner")}
        dropped = {f"dropped: {reason}": count for reason, count in origin["dropped_by_reason"].items()}
        blocks.append("made of\n" + pd.Series(totals | dropped).to_string())
    return "\n\n".join(blocks)
