"""Scheduling of one job: its items in batches, which of them wait, are done or are late."""

import time
from bisect import insort
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from math import inf
from typing import Any, NamedTuple

from ray.actor import ActorHandle

LATE = 4.0
"""A batch is late after this many times the median duration of the finished ones ..."""

LATE_S = 10.0
"""... but not before this many seconds."""


class Call(NamedTuple):
    """A batch that a worker is computing; ``since`` is its start in monotonic seconds."""

    worker: ActorHandle
    job: "BatchJob"
    batch: int
    since: float


class BatchJob:
    """``items`` in batches of ``batch_size``, and their results.

    A batch is handed out once; again if its worker is lost; and, if the work is ``repeatable``, once more when it is
    late and a worker is idle. The first result counts.
    """

    def __init__(self, items: list, batch_size: int, repeatable: bool):
        self.batches = [items[at : at + batch_size] for at in range(0, len(items), batch_size)]
        self.late_after = inf
        """Seconds after which a batch is late: infinite until one is done, 0 once the job has ended."""
        self.repeated = 0
        self.items_done = 0
        self._repeatable = repeatable
        self._waiting = deque(range(len(self.batches)))
        self._results: dict[int, list] = {}
        self._seconds: list[float] = []  # ascending

    @property
    def is_done(self) -> bool:
        return len(self._results) == len(self.batches)

    def results(self) -> list[Any]:
        """One result an item, in the order of the items."""
        return [result for batch in range(len(self.batches)) for result in self._results[batch]]

    def needs(self, call: Call) -> bool:
        """Tell whether the result of this call is still missing."""
        return call.job is self and call.batch not in self._results

    def next_batches(self, calls: Iterable[Call]) -> Iterator[int]:
        """Batches to hand out now, given the running calls: those that wait, then those that are late."""
        late = self.late_batches(calls)
        while self._waiting:
            yield self._waiting.popleft()
        for batch in late:
            self.repeated += 1
            yield batch

    def finish(self, call: Call, results: list) -> None:
        """Store the results of a batch."""
        self._results[call.batch] = results
        self.items_done += len(results)
        insort(self._seconds, time.monotonic() - call.since)
        if self._repeatable:
            middle = len(self._seconds) // 2
            median = (self._seconds[middle] + self._seconds[~middle]) / 2
            self.late_after = max(LATE_S, LATE * median)

    def put_back(self, call: Call, calls: Iterable[Call]) -> None:
        """Hand the batch of a lost call out again, first of all, unless it is done or in one of ``calls`` too."""
        if self.needs(call) and not any(other.job is self and other.batch == call.batch for other in calls):
            self._waiting.appendleft(call.batch)

    def late_batches(self, calls: Iterable[Call]) -> list[int]:
        """Batches that only one worker has, and for too long."""
        now = time.monotonic()
        return [call.batch for call in self._alone(calls) if now - call.since >= self.late_after]

    def next_late(self, calls: Iterable[Call]) -> float:
        """Return the time, in monotonic seconds, at which the next batch will be late."""
        return min((call.since + self.late_after for call in self._alone(calls)), default=inf)

    def _alone(self, calls: Iterable[Call]) -> list[Call]:
        """The calls for missing batches that only one worker has."""
        needed = [call for call in calls if self.needs(call)]
        workers = Counter(call.batch for call in needed)
        return [call for call in needed if workers[call.batch] == 1]
