"""Plots of a page as plotly figures: plain dictionaries, drawn in the browser."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

COLOURS = ("#0b66c3", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#0e7490", "#be185d", "#475569")
DASHES = ("solid", "dot")
"""Lines of the first and of the second run."""
Figure = dict[str, Any]


def line(x: Sequence[float], y: Sequence[float | None], name: str, number: int, run: int = 0) -> dict[str, Any]:
    """Return a line in the colour ``number``; few points are marked."""
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(x) < 30 else "lines",
        "x": list(x),
        "y": list(y),
        "name": name,
        "line": {"color": COLOURS[number % len(COLOURS)], "dash": DASHES[run % len(DASHES)], "width": 2},
        "marker": {"size": 5},
    }


def histogram(counts: Sequence[float], edges: Sequence[float], name: str, number: int) -> dict[str, Any]:
    """Return bars of counts between edges."""
    widths = [high - low for low, high in pairwise(edges)]
    middles = [low + width / 2 for low, width in zip(edges, widths, strict=False)]
    colour = {"color": COLOURS[number % len(COLOURS)], "opacity": 0.8}
    return {"type": "bar", "x": middles, "y": list(counts), "width": widths, "name": name, "marker": colour}


def columns(values: Sequence[float], name: str, number: int) -> dict[str, Any]:
    """Return a bar for each value, from 0 on."""
    colour = {"color": COLOURS[number % len(COLOURS)], "opacity": 0.8}
    return {"type": "bar", "x": list(range(len(values))), "y": list(values), "name": name, "marker": colour}


def bars(rows: Sequence[tuple[str, float, float]], unit: str, number: int = 0) -> dict[str, Any]:
    """Return horizontal bars: name, begin and length of each."""
    return {
        "type": "bar",
        "orientation": "h",
        "y": [name for name, _, _ in rows],
        "base": [begin for _, begin, _ in rows],
        "x": [length for _, _, length in rows],
        "marker": {"color": COLOURS[number % len(COLOURS)]},
        "hovertemplate": f"%{{y}}: %{{x:.3g}} {unit}<extra></extra>",
        "showlegend": False,
    }


def figure(traces: Sequence[dict[str, Any]], x: str, y: str, **layout: Any) -> Figure:
    """Return a figure with titles of its axes; the page adds size, fonts and colours."""
    axes = {
        "xaxis": {"title": {"text": x}, "automargin": True},
        "yaxis": {"title": {"text": y}, "automargin": True},
    }
    return {"data": list(traces), "layout": axes | {"showlegend": len(traces) > 1} | layout}
