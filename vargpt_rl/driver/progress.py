"""Progress of a whole run: one bar for its steps and one for the part under way, or plain lines without a terminal."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from vargpt_rl.common.bars import LINE_EVERY_S
from vargpt_rl.common.logs import RECORD
from vargpt_rl.page.step_titles import step_title

logger = logging.getLogger(__name__)

KNOWN_FROM = 0.03
"""Share of the work that must be done before the time left is told."""
KNOWN_AFTER_S = 0.5
"""Seconds after which the speed of a part is told."""
MOST = 0.95
"""Share of a step that its first part stands for."""


def duration(seconds: float) -> str:
    """Format seconds as ``1:05`` or ``2:03:04``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def rate(count: int, seconds: float) -> str:
    """Format a speed; nothing if it is not known yet."""
    if not count or seconds < KNOWN_AFTER_S:
        return ""
    return f"{count / seconds:.1f}/s" if count >= seconds else f"{seconds / count:.1f} s each"


class RunProgress:
    """Display of a run's steps and of the time left.

    ``plan`` tells which steps there are. On a terminal, two bars at the bottom; elsewhere a line for each step and one
    every ``LINE_EVERY_S`` within it.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic):
        self.console = console or Console(file=sys.stderr)
        self.clock = clock
        self.weights: dict[str, float] = {}
        self.past: set[str] = set()
        self.began = self.told = clock()
        self.finished = 0.0  # weight of the steps finished since ``began``
        self.now = ""
        self.within = 0.0  # share of the current step
        self.score = ""
        self.bars: Progress | None = None
        self.whole = self.current = TaskID(0)
        self.main = ""  # first part of the current step, which stands for most of it
        self.named = ""  # part under way
        self.part_began = self.began
        self.before: tuple[int, int] | None = None  # items done before the part of work under way, and items in all

    @contextmanager
    def part_of(self, before: int, total: int) -> Iterator[None]:
        """Count what `part` is told after ``before`` items, of ``total``."""
        self.before = before, total
        try:
            yield
        finally:
            self.before = None

    def plan(self, weights: Mapping[str, float], done: Iterable[str]) -> None:
        """Take the steps of the run with their weights, and those that are done; begin to show bars."""
        self.weights = dict(weights)
        self.past = set(done)
        self.began = self.told = self.clock()
        if self.console.is_terminal:
            self.bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[figures]}"),
                console=self.console,
                transient=True,
            )
            self.whole = self.bars.add_task("starting", total=1.0, figures="")
            self.current = self.bars.add_task("", total=1.0, figures="", visible=False)
            self.bars.start()

    def say(self, text: str) -> None:
        """Tell what begins while nothing moves."""
        if self.bars:
            RECORD.info(text)
            self.bars.update(self.whole, description=text)
        else:
            logger.info(text)

    def enter(self, step: str) -> None:
        """Begin a step."""
        if not self.now:
            self.began = self.clock()  # what came before is the start of workers
        if step.partition("/")[0] != self.now.partition("/")[0]:
            self.score = ""  # of another resolution, perhaps: such scores are not comparable
        self.now = step
        self.within = 0.0
        self.main = self.named = ""
        self.told = self.clock()
        (RECORD if self.bars else logger).info(self.line())
        self._show()

    def leave(self, step: str) -> None:
        """End a step."""
        self.past.add(step)
        self.finished += self.weights.get(step, 0.0)
        self.within = 0.0
        if self.bars:
            self.bars.update(self.current, visible=False)
        self._show()

    def part(self, name: str, done: int, total: int, info: str = "") -> None:
        """Tell how far a part of the current step is."""
        if self.before:
            done, total = self.before[0] + done, self.before[1]
        self.main = self.main or name
        if name == self.main:
            self.within = max(self.within, MOST * done / max(total, 1))
        if name != self.named:
            self.named, self.part_began = name, self.clock()
            if self.bars:
                self.bars.reset(self.current, description=f"  {name.replace('_', ' ')}", total=total, visible=True)
        if self.bars:
            self.bars.update(self.current, completed=done, figures=self._figures_of_part(done, total, info))
        elif self.clock() - self.told >= LINE_EVERY_S:
            self.told = self.clock()
            logger.info(" ".join([self.line(), "-", name.replace("_", " "), self._figures_of_part(done, total, info)]))
        self._show()

    def _figures_of_part(self, done: int, total: int, info: str) -> str:
        return " ".join(filter(None, [f"{done}/{total}", rate(done, self.clock() - self.part_began), info]))

    @property
    def share(self) -> float:
        """Share of the whole run that is done, by weight."""
        total = sum(self.weights.values()) or 1.0
        past = sum(self.weights.get(step, 0.0) for step in self.past)
        return min(1.0, (past + self.within * self.weights.get(self.now, 0.0) * (self.now not in self.past)) / total)

    def left(self) -> float | None:
        """Estimate the seconds left, from the speed since this start; None if too little is done."""
        total = sum(self.weights.values())
        worked = self.finished + self.within * self.weights.get(self.now, 0.0) * (self.now not in self.past)
        if not total or worked < KNOWN_FROM * total:
            return None
        return (self.clock() - self.began) * (1 - self.share) * total / worked

    def line(self) -> str:
        """Return step k of n, what it is, the time left and the last score."""
        number = 1 + len(self.past & self.weights.keys() - {self.now})
        left = self.left()
        found = [f"[{number}/{len(self.weights)}] {step_title(self.now)}", *self._figures(left)]
        return ", ".join(found)

    def _figures(self, left: float | None) -> list[str]:
        return [*([] if left is None else [f"about {duration(left)} left"]), *([self.score] if self.score else [])]

    def _show(self) -> None:
        if self.bars:
            number = 1 + len(self.past & self.weights.keys() - {self.now})
            what = f"[{number}/{len(self.weights)}] {step_title(self.now)}".replace("[", "\\[", 1)
            figures = ", ".join([f"{self.share:.0%}", *self._figures(self.left())])
            self.bars.update(self.whole, description=what, completed=self.share, figures=figures)

    def close(self) -> None:
        """Remove the bars."""
        if self.bars:
            self.bars.stop()
            self.bars = None
