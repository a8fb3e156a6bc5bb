"""Rewards in processes of their own: one that hangs, dies or raises loses its own images and nobody else's.

``RewardServer`` is a Ray actor without any work of its own. It has a ``RewardQueue`` for each reward, which hands
batches to the reward's process one after another, counts what is lost and why, and kills and restarts a process that
hangs or dies. Queues do not wait for each other.
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

START_S = 900.0
"""Seconds in which a reward's process must be up and have loaded what it needs."""

MAX_RESTARTS = 3
"""Of one reward's process, before the reward is given up. Each restart costs a timeout or a load of the weights."""


@dataclass
class RewardTerm:
    """One reward of several.

    ``required``: an image that it does not score has no score at all; without it, the others decide. ``timeout_s`` is
    for one batch; a failed batch is tried ``retries`` times more. ``python`` is the interpreter of a virtual
    environment for this reward alone, which needs this package and the same Ray. ``options`` go to a class's
    constructor.
    """

    path: str
    weight: float = 1.0
    required: bool = True
    timeout_s: float = 120.0
    batch_size: int = 16
    retries: int = 1
    python: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not math.isfinite(self.weight) or self.weight == 0:
            raise ValueError(f"weight={self.weight}: expected a number other than 0")
        if self.timeout_s <= 0 or self.batch_size < 1 or self.retries < 0:
            raise ValueError(
                f"timeout_s={self.timeout_s} batch_size={self.batch_size} retries={self.retries}: "
                "expected more than 0, 1 or more, 0 or more"
            )


@dataclass
class RewardStats:
    """What became of the images given to one reward; ``errors`` has the first message of each reason."""

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

    def report(self) -> dict[str, object]:
        """The tally as JSON."""
        return {
            "scored": self.scored,
            "mean": self.total / self.scored if self.scored else None,
            "seconds": self.seconds,
            "restarts": self.restarts,
            "unscored": dict(self.unscored),
            "errors": self.errors,
        }


class RewardLost(Exception):
    """A batch that a reward did not score: ``reason`` to count it by, and a message if there is more to say."""

    def __init__(self, reason: str, message: str = ""):
        super().__init__(message)
        self.reason = reason


@ray.remote(num_cpus=0)
class RewardProcess:
    """The process of one reward. Images come as PNG, values go as plain numbers."""

    def __init__(self, make: Callable[[], Reward]):
        self.make = make

    def load(self) -> None:
        """Make the reward: here and not in the constructor, whose errors come as a long text only."""
        self.reward = self.make()

    def score(self, pngs: list[bytes], prompts: list[str], first: int) -> list[float | None]:
        """The values of ``prompts`` with the images from number ``first`` on."""
        images = [from_png(png) for png in pngs[first : first + len(prompts)]]
        return [None if value is None else float(value) for value in self.reward(images, prompts)]


class RewardQueue:
    """One reward's process, its queue and its tally. ``make`` is in the object store: its ref in a list."""

    def __init__(self, term: RewardTerm, make: list[ray.ObjectRef]):
        self.term, self.make = term, make
        self.tally = RewardStats()
        self.turn = asyncio.Lock()
        self.process: ray.actor.ActorHandle | None = None
        self.starts = 0

    async def score(self, pngs: ray.ObjectRef, prompts: Sequence[str]) -> list[float | None]:
        """A value for each image; None where there is none, for whatever reason."""
        async with self.turn:
            began, values = perf_counter(), []
            for first in range(0, len(prompts), self.term.batch_size):
                values += await self._batch(pngs, list(prompts[first : first + self.term.batch_size]), first)
            self.tally.seconds += perf_counter() - began
            return values

    async def _batch(self, pngs: ray.ObjectRef, prompts: list[str], first: int) -> list[float | None]:
        for _ in range(1 + self.term.retries):
            try:
                return self._count(await self._attempt(pngs, prompts, first))
            except RewardLost as error:
                lost = error
        self.tally.lose(lost.reason, len(prompts), str(lost))
        return [None] * len(prompts)

    async def _attempt(self, pngs: ray.ObjectRef, prompts: list[str], first: int) -> list[float | None]:
        if self.process is None:
            if self.starts > MAX_RESTARTS:
                raise RewardLost(f"given up after {MAX_RESTARTS} restarts")
            self.starts += 1
            self.tally.restarts = self.starts - 1
            env = {"runtime_env": {"py_executable": self.term.python}} if self.term.python else {}
            self.process = RewardProcess.options(**env).remote(self.make[0])
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
        except RayTaskError as error:  # before the timeout: it is a TimeoutError too where the reward raised one
            raise RewardLost(f"raised {type(error.cause).__name__}", _first_line(error.cause)) from error
        except TimeoutError as error:
            self._end()
            raise RewardLost("timeout", f"no answer in {timeout_s:g} s") from error
        except RayError as error:
            self._end()
            raise RewardLost("process died", _first_line(error)) from error

    def _end(self) -> None:
        if self.process is not None:
            ray.kill(self.process)
            self.process = None

    def _count(self, values: list[float | None]) -> list[float | None]:
        """The values, with None for those that are no number, all counted."""
        finite = [value if value is not None and math.isfinite(value) else None for value in values]
        scored = [value for value in finite if value is not None]
        none, odd = values.count(None), finite.count(None) - values.count(None)
        self.tally.scored += len(scored)
        self.tally.total += sum(scored)
        for reason, count in (("returned None", none), ("not finite", odd)):
            if count:
                self.tally.lose(reason, count)
        return finite


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


@ray.remote(num_cpus=0)
class RewardServer:
    """The lanes of several rewards, by name. It never looks at an image: their refs pass through in a list."""

    def __init__(self, terms: dict[str, RewardTerm], makes: dict[str, list[ray.ObjectRef]]):
        self.lanes = {name: RewardQueue(term, makes[name]) for name, term in terms.items()}

    async def score(self, pngs: list[ray.ObjectRef], prompts: list[str]) -> dict[str, list[float | None]]:
        """What each reward says of each image."""
        values = await asyncio.gather(*(lane.score(pngs[0], prompts) for lane in self.lanes.values()))
        return dict(zip(self.lanes, values, strict=True))

    async def report(self) -> dict[str, dict[str, object]]:
        """Each reward's tally so far."""
        return {name: lane.tally.report() for name, lane in self.lanes.items()}
