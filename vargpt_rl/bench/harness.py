"""Timing, peak memory and tables, shared by the benchmarks."""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")


def timed(function: Callable[..., Result], *args) -> tuple[float, Result]:
    """Call a function; return the seconds it took and its result."""
    began = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - began, result


def peak_memory(function: Callable, *args) -> int:
    """Call a function; return the peak bytes of torch's CPU allocator, on top of those allocated before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function(*args)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = 0
    peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def results_table(title: str, columns: Sequence[str], left: Sequence[str] = ()) -> Table:
    """Create a table. Columns are right-aligned, except those in ``left``."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    return table
