"""Rewards in separate processes: one that hangs, dies or raises loses only its own scores.

``RewardServer`` is a Ray actor that computes nothing itself. It has a ``RewardQueue`` for each reward, which sends
batches to the reward's process one after another, counts the unscored images by reason, and kills and restarts a
process that hangs or dies. Queues do not wait for each other.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from rewards import Reward
from rewards.images import from_png
from vargpt_rl.common.errors import first_line
from vargpt_rl.common.failpoints import point
from vargpt_rl.common.settings import Count, CountOrNone, Seconds

START_S = 900.0
"""Seconds in which a reward's process must start and load its model."""

MAX_RESTARTS = 3
"""Restarts of one reward's process before it is given up. Each costs a timeout or loading the weights."""


@dataclass
class RewardTerm:
    """One reward of several."""

    path: str
    """The plug-in, ``package.module:Name`` or ``file.py:name``."""

    weight: float = 1.0

    required: bool = True
    """True leaves an image that this reward does not score without a score; False lets the others decide."""

    timeout_s: Seconds = 120.0
    """Seconds for one batch."""

    batch_size: Count = 16

    retries: CountOrNone = 1
    """Further attempts at a failed batch."""

    python: str | None = None
    """Interpreter of a virtual environment for this reward alone; it needs this package and the same Ray."""

    options: dict[str, Any] = field(default_factory=dict)
    """Arguments for a class's constructor."""

    def __post_init__(self):
        if self.weight == 0:
            raise ValueError(f"weight={self.weight}: expected a number other than 0")


@dataclass
class RewardStats:
    """Counts of one reward's images; ``errors`` has the first message of each reason."""

    scored: int = 0
    total: float = 0.0
    seconds: float = 0.0
    restarts: int = 0
    unscored: Counter[str] = field(default_factory=Counter)
    errors: dict[str, str] = field(default_factory=dict)

    def lose(self, reason: str, count: int, message: str = "") -> None:
        """Count images without a score."""
        self.unscored[reason] += count
        if message:
            self.errors.setdefault(reason, message)

    def report(self, before: "RewardStats") -> dict[str, Any]:
        """The counts since ``before``, as JSON."""
        scored = self.scored - before.scored
        unscored = self.unscored - before.unscored
        return {
            "scored": scored,
            "mean": (self.total - before.total) / scored if scored else None,
            "seconds": self.seconds - before.seconds,
            "restarts": self.restarts - before.restarts,
            "unscored": dict(unscored),
            "errors": {reason: message for reason, message in self.errors.items() if reason in unscored},
        }


class RewardLost(Exception):
    """A batch was not scored: ``reason`` is its category, the message gives details."""

    def __init__(self, reason: str, message: str = ""):
        super().__init__(message)
        self.reason = reason


@ray.remote(num_cpus=0)
class RewardProcess:
    """The process of one reward. It receives PNG images and returns plain numbers."""

    def __init__(self, make: Callable[[], Reward]):
        self.make = make

    def load(self) -> None:
        """Build the reward: not in the constructor, whose errors Ray reports only as a long text."""
        self.reward = self.make()

    def score(self, pngs: list[bytes], prompts: list[str], first: int) -> list[float | None]:
        """Score ``prompts`` with the images from index ``first`` on."""
        point("reward/score")
        images = [from_png(png) for png in pngs[first : first + len(prompts)]]
        return [None if value is None else float(value) for value in self.reward(images, prompts)]


class RewardQueue:
    """One reward's process, queue and statistics. ``make`` is a list of one ref to the reward's factory."""

    def __init__(self, term: RewardTerm, make: list[ray.ObjectRef]):
        self.term = term
        self.make = make
        self.stats = RewardStats()
        self.turn = asyncio.Lock()
        self.process: ray.actor.ActorHandle | None = None
        self.starts = 0

    async def score(self, pngs: ray.ObjectRef, prompts: Sequence[str]) -> list[float | None]:
        """One value for each image; None for an image that could not be scored."""
        async with self.turn:
            began, values = perf_counter(), []
            for first in range(0, len(prompts), self.term.batch_size):
                values += await self._batch(pngs, list(prompts[first : first + self.term.batch_size]), first)
            self.stats.seconds += perf_counter() - began
            return values

    async def _batch(self, pngs: ray.ObjectRef, prompts: list[str], first: int) -> list[float | None]:
        for _ in range(1 + self.term.retries):
            try:
                return self._count(await self._attempt(pngs, prompts, first))
            except RewardLost as error:
                lost = error
        self.stats.lose(lost.reason, len(prompts), str(lost))
        return [None] * len(prompts)

    async def _attempt(self, pngs: ray.ObjectRef, prompts: list[str], first: int) -> list[float | None]:
        if self.process is None:
            if self.starts > MAX_RESTARTS:
                raise RewardLost(f"given up after {MAX_RESTARTS} restarts")
            self.stats.restarts += self.starts > 0
            self.starts += 1
            env = {"runtime_env": {"py_executable": self.term.python}} if self.term.python else {}
            self.process = RewardProcess.options(**env).remote(  # type: ignore[attr-defined]  # ray.remote adds it
                self.make[0]
            )
            try:
                await self._answer(self.process.load.remote(), START_S)
            except RewardLost as lost:
                self._end()
                raise RewardLost("did not start", f"{lost.reason}: {lost}") from lost
        values = await self._answer(self.process.score.remote(pngs, prompts, first), self.term.timeout_s)
        if len(values) != len(prompts):
            raise RewardLost("wrong length", f"{len(values)} values for {len(prompts)} images")
        return values

    async def _answer(self, ref: ray.ObjectRef, timeout_s: float) -> list[float | None]:
        try:
            return await asyncio.wait_for(ref, timeout_s)
        except RayTaskError as error:  # first: if the reward raised a TimeoutError, this is one too
            raise RewardLost(f"raised {type(error.cause).__name__}", first_line(error.cause)) from error
        except TimeoutError as error:
            self._end()
            raise RewardLost("timeout", f"no answer in {timeout_s:g} s") from error
        except RayError as error:
            self._end()
            raise RewardLost("process died", first_line(error)) from error

    def _end(self) -> None:
        if self.process is not None:
            ray.kill(self.process)
            self.process = None

    def _count(self, values: list[float | None]) -> list[float | None]:
        """Count the values, and replace those that are not finite by None."""
        finite = [value if value is not None and math.isfinite(value) else None for value in values]
        scored = [value for value in finite if value is not None]
        none, odd = values.count(None), finite.count(None) - values.count(None)
        self.stats.scored += len(scored)
        self.stats.total += sum(scored)
        for reason, count in (("returned None", none), ("not finite", odd)):
            if count:
                self.stats.lose(reason, count)
        return finite


@ray.remote(num_cpus=0)
class RewardServer:
    """The queues of several rewards, by name. Images pass through as a list of refs, unread."""

    def __init__(self, terms: dict[str, RewardTerm], makes: dict[str, list[ray.ObjectRef]]):
        self.queues = {name: RewardQueue(term, makes[name]) for name, term in terms.items()}

    async def score(self, pngs: list[ray.ObjectRef], prompts: list[str]) -> dict[str, list[float | None]]:
        """Every reward's value for each image."""
        values = await asyncio.gather(*(queue.score(pngs[0], prompts) for queue in self.queues.values()))
        return dict(zip(self.queues, values, strict=True))

    async def begin(self) -> dict[str, RewardStats]:
        """Begin a new use: rewards that were given up are tried again. Return every reward's statistics so far."""
        for queue in self.queues.values():
            queue.starts = 0 if queue.process is None else 1
        return await self.stats()

    async def stats(self) -> dict[str, RewardStats]:
        """Every reward's statistics so far."""
        return {name: queue.stats for name, queue in self.queues.items()}
