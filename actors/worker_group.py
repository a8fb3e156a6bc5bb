"""The life of rollout workers: start, health, replacement, and what each of them is computing.

A replacement replays the published weight sets before it serves. Not to be used by several threads at once.
"""

import logging
import time
from collections.abc import Callable
from enum import StrEnum, auto
from math import inf
from typing import Any, NamedTuple, Protocol, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError

from actors.batches import BatchJob, Call
from actors.cluster import LOST, Note, Place
from actors.config import RolloutConfig
from actors.published import PublishedWeights
from actors.resources import Placement
from vargpt_rl.data.images import ImageSource
from vargpt_rl.model.adapter import AdapterConfig

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Outcome = list | Exception | None
"""The result of a call, the error that it raised, or None if its worker was lost."""


class State(StrEnum):
    """State of a worker. Suspect: computing a late batch, or one whose result is no longer needed.
    Stale: running again, but without the published weights so far."""

    HEALTHY, SUSPECT, DEAD, RESTARTING, STALE = auto(), auto(), auto(), auto(), auto()


class _Start(NamedTuple):
    """A worker that is loading its model, then replaying the published sets (one call each)."""

    worker: ActorHandle
    loaded: ray.ObjectRef
    replayed: list[ray.ObjectRef]
    since: float


class AnyWorker(Protocol):
    """All that a group asks of a worker to which no weights are published."""

    def status(self) -> dict[str, int | str]: ...


class WorkerGroup:
    """``plan.workers`` actors of class ``kind``, each in its one of ``places``, if given; its replacement too.

    ``wait_until_ready`` returns when all have loaded their model. ``restarts`` counts replacements; ``events``
    describes them, and ``note`` is called with each.
    """

    def __init__(
        self,
        config: RolloutConfig,
        plan: Placement,
        *,
        kind: type[AnyWorker],
        checkpoint: str,
        adapter: AdapterConfig | None,
        source: ImageSource,
        weights: PublishedWeights,
        places: list[Place] | None,
        note: Note,
    ):
        self.config = config
        self.plan = plan
        self.restarts = 0
        self.events: list[str] = []
        self._kind = ray.remote(kind)
        self._checkpoint = checkpoint
        self._adapter = adapter
        self._source = ray.put(source)
        self._weights = weights
        self._places = places
        self._note = note
        self._starting: dict[ray.ObjectRef, _Start] = {}
        self._running: dict[ray.ObjectRef, Call] = {}  # stragglers' calls of earlier jobs too
        self._dead: set[ActorHandle] = set()
        self._started_once = False
        self.handles = [self._start(place) for place in range(plan.workers)]

    def wait_until_ready(self) -> None:
        """Wait for the workers that were started first; one that does not come up in time is replaced.

        Errors of loading the model are raised, and RuntimeError after too many replacements.
        """
        now = time.monotonic()  # the caller may have done other work since they were started
        self._starting = {ref: start._replace(since=now) for ref, start in self._starting.items()}
        while self._starting:
            self.wait()
        self._started_once = True

    # Calls

    @property
    def calls(self) -> list[Call]:
        """The calls that are running."""
        return list(self._running.values())

    def _begun(self) -> list[Call | _Start]:
        return [*self._running.values(), *self._starting.values()]

    def idle(self) -> list[ActorHandle]:
        """Workers that compute nothing."""
        busy = {begun.worker for begun in self._begun()}
        return [worker for worker in self.handles if worker not in busy]

    def submit(self, worker: ActorHandle, job: BatchJob, batch: int, method: Callable, *args: Any) -> None:
        """Have a worker compute ``method(items, *args)`` on a batch of a job."""
        ref = getattr(worker, method.__name__).remote(job.batches[batch], *args)
        self._running[ref] = Call(worker, job, batch, time.monotonic())

    def wait(self, until: float = inf) -> list[tuple[Call, Outcome]]:
        """Wait for news, at most until a moment in monotonic seconds: the calls that have ended.

        A call that takes too long counts as lost. Its worker still has to be replaced; one that does not come up is
        replaced here.
        """
        limit = self.config.call_timeout_s
        ends = [begun.since + limit for begun in self._begun()]
        timeout = max(0.0, min([*ends, until]) - time.monotonic())
        ready, _ = ray.wait([*self._running, *self._starting], timeout=timeout)
        ended: list[tuple[Call, Outcome]] = []
        for ref in ready:
            if ref in self._starting:
                self._started(ref)
            else:
                ended.append((self._running.pop(ref), _outcome(ref)))
        now = time.monotonic()
        for start in [start for start in self._starting.values() if now - start.since >= limit]:
            self.replace(start.worker, "starting")
        overdue = [ref for ref, call in self._running.items() if now - call.since >= limit]
        return ended + [(self._running.pop(ref), None) for ref in overdue]

    def call_all(self, method: Callable[..., Result], *args: Any) -> list[Result]:
        """One call to every worker, all at once; a lost worker's replacement answers instead."""
        name = method.__name__
        calls = [(worker, getattr(worker, name).remote(*args)) for worker in self.handles]
        answers = []
        for worker, ref in calls:
            while True:
                try:
                    answers.append(ray.get(ref, timeout=self._time_left(worker)))
                    break
                except (*LOST, GetTimeoutError):
                    worker = self.replace(worker, name)
                    ref = getattr(worker, name).remote(*args)
        return answers

    def _time_left(self, worker: ActorHandle) -> float:
        """Seconds in which a worker must answer, counted from the start of the batch that it is computing, if any."""
        now = time.monotonic()
        since = min((call.since for call in self._running.values() if call.worker == worker), default=now)
        return max(0.0, since + self.config.call_timeout_s - now)

    # Life

    def health(self) -> list[State]:
        """The state of every worker as far as it is known, without waiting."""
        now = time.monotonic()
        states = dict.fromkeys(self.handles, State.HEALTHY)
        ended = {ref for ref in (*self._running, *self._starting) if ray.wait([ref], timeout=0)[0]}
        for ref, call in self._running.items():
            if ref not in ended and now - call.since >= call.job.late_after:
                states[call.worker] = State.SUSPECT
        for ref, start in self._starting.items():
            loaded = ray.wait([start.loaded], timeout=0)[0]
            if ref not in ended:
                states[start.worker] = State.STALE if loaded and start.replayed else State.RESTARTING
        return [State.DEAD if worker in self._dead else state for worker, state in states.items()]

    def replace(self, worker: ActorHandle, during: str) -> ActorHandle:
        """Kill a lost worker, if it still lives, and start its replacement. RuntimeError after too many."""
        ray.kill(worker)
        self._starting = {ref: start for ref, start in self._starting.items() if start.worker != worker}
        self._running = {ref: call for ref, call in self._running.items() if call.worker != worker}
        place = self.handles.index(worker)
        limit = self.config.max_restarts
        if self.restarts >= limit:
            self.tell(f"worker {place} lost during {during}, after {limit} restarts of at most {limit}")
            self._dead.add(worker)
            raise RuntimeError(f"more than {limit} rollout workers lost: {'; '.join(self.events)}")
        self.restarts += 1
        self.tell(f"worker {place} lost during {during}: restart {self.restarts} of {limit}", restart=True)
        self.handles[place] = self._start(place)
        return self.handles[place]

    def tell(self, event: str, restart: bool = False) -> None:
        """Record an event and pass it on."""
        logger.info(event)
        self.events.append(event)
        self._note(event, restart)

    def close(self) -> None:
        """Kill the workers."""
        for worker in self.handles:
            ray.kill(worker)
        self.handles = []

    def _start(self, place: int) -> ActorHandle:
        """A new worker; calls to it queue behind its replay of the published sets."""
        options = {**self.plan.worker_options, "runtime_env": {"env_vars": {"HF_HUB_OFFLINE": "1"}}}
        if self._places:
            options["scheduling_strategy"] = self._places[place]
        worker = self._kind.options(**options).remote(
            self._checkpoint,
            self._source,
            threads=self.plan.threads_per_worker,
            use_gpu=self.plan.use_gpu,
            bf16=self.plan.bf16,
            cuda_graphs=self.plan.use_gpu and self.config.cuda_graphs,
            version_required=self._weights.version,
            adapter=self._adapter,
        )
        loaded = worker.status.remote()
        replayed = self._weights.replay(worker)
        self._starting[worker.status.remote()] = _Start(worker, loaded, replayed, time.monotonic())
        return worker

    def _started(self, ref: ray.ObjectRef) -> None:
        """A worker is ready, or died while it started. An error of the replay is raised: its weights are wrong."""
        start = self._starting.pop(ref)
        try:
            ray.get([*start.replayed, ref])
        except LOST as error:
            if not self._started_once and "creation task" in str(error):  # an error of the model, which would recur
                raise
            self.replace(start.worker, "starting")


def _outcome(ref: ray.ObjectRef) -> Outcome:
    try:
        return ray.get(ref)
    except LOST:
        return None
    except Exception as error:
        return error
