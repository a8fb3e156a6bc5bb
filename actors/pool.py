"""The pool of rollout workers: splits work over them, survives their deaths, and publishes new weights to all.

A batch that dies with its worker is given to another one, and so is, when there is nothing else to do, a batch that
takes far longer than the others: the first result counts. A replacement is started and replays the published weight
sets before it serves. Errors of the work itself (a bad reward, a bad size) are not retried: they reach the caller as
they were raised.
"""

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Container
from enum import StrEnum, auto
from math import inf
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import ray
from ray.actor import ActorClass, ActorHandle
from ray.exceptions import GetTimeoutError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

from actors.cluster import LOST, Note, Place, unnoted
from actors.resources import Placement, RolloutConfig
from actors.transport import (
    AutoTransfer,
    BroadcastTransfer,
    ChunkServer,
    ObjectStoreTransfer,
    SharedFileTransfer,
    WeightTransfer,
)
from actors.weights import SwapReport, WeightLayout, checksum, layout_of
from actors.worker import Check, EncodedImage, Failure, ImageScore, PromptedBits, Rewards, RolloutWorker
from vargpt_rl.data.batches import ImageSource
from vargpt_rl.data.samples import Prompt, Sample
from vargpt_rl.model.generate import SamplingConfig

Progress = Callable[[str, int, int], None]
"""Called with (label, items done, items in all)."""


LATE, LATE_S = 4.0, 10.0
"""A batch that takes so many times the median of those that are done, and so many seconds, is given to an idle worker
too."""

REPEATABLE = ("draw", "encode", "score", "answer", "reply", "faults")
"""Methods of which two workers may do the same batch at once: they leave nothing behind."""

BROADCAST_TIMEOUT_S = 60.0
"""How long a worker waits for the others in a broadcast."""


class _WeightSet(NamedTuple):
    """A published set, for workers yet to come too: its file must stay."""

    version: int
    checksum: str
    layout: WeightLayout
    path: Path


class State(StrEnum):
    """What the pool knows of a worker. Suspect: at work on a batch for far longer than the others were on theirs, or
    still after another worker had its result. Stale: up again, but without the published weights so far."""

    HEALTHY, SUSPECT, DEAD, RESTARTING, STALE = auto(), auto(), auto(), auto(), auto()


class _Call(NamedTuple):
    """A batch in the hands of a worker: which batch of which call of ``map``, and since when (monotonic seconds)."""

    worker: ActorHandle
    job: int
    batch: int
    since: float


class _Start(NamedTuple):
    """A worker that is loading its model, then replaying the published sets (a call each), since when."""

    worker: ActorHandle
    loaded: ray.ObjectRef
    replayed: list[ray.ObjectRef]
    since: float


class RolloutPool:
    """``plan.workers`` rollout workers, all started with ``checkpoint``; returns when they are ready.

    Each is in its one of ``places``, its replacement too; without them, wherever there is room.

    ``progress`` is told after every batch; without it, a bar on stderr shows the same. ``restarts`` counts
    replacements, ``events`` says in words what happened, and ``note`` is told. Workers are of class ``kind`` and are
    sent those published tensors whose names ``takes`` accepts. Not to be used by several threads at once.
    """

    def __init__(
        self,
        config: RolloutConfig,
        plan: Placement,
        checkpoint: str,
        source: ImageSource,
        progress: Progress | None = None,
        places: list[Place] | None = None,
        kind: ActorClass = RolloutWorker,
        takes: Callable[[str], bool] = lambda name: True,
        note: Note = unnoted,
    ):
        self.config = config
        self.plan = plan
        self.progress = progress
        self.kind, self.takes, self.note = kind, takes, note
        self.version = 0
        self.restarts = self.repeated = 0
        self.events: list[str] = []
        self._checkpoint = str(checkpoint)
        self._places = places
        self._source = ray.put(source)
        self._published: list[_WeightSet] = []
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._shelf = ChunkServer.options(scheduling_strategy=here).remote()
        self._starting: dict[ray.ObjectRef, _Start] = {}
        self._running: dict[ray.ObjectRef, _Call] = {}  # also of earlier jobs: what stragglers are still at
        self._dead: set[ActorHandle] = set()
        self._job, self._late_after = 0, 0.0
        self._workers = [self._start(place) for place in range(plan.workers)]
        ray.get([worker.status.remote() for worker in self._workers], timeout=config.call_timeout_s)
        self._starting.clear()

    # Work

    def draw(
        self, prompts: list[Prompt], seeds: list[int], resolution: int, sampling: SamplingConfig, checkpoint: str
    ) -> list[Sample]:
        """One image for each prompt and seed; ``checkpoint`` names, in the samples, what the weights are of."""
        jobs = list(zip(prompts, seeds, strict=True))
        return self.map("draw", jobs, resolution, sampling, checkpoint, label="draw")

    def encode(self, keys: list[str], resolution: int) -> list[EncodedImage | Failure]:
        """Images of the source as bits and features."""
        return self.map("encode", keys, resolution, label="encode")

    def faults(self, keys: list[str], side: int) -> list[Failure | None]:
        """Why images of the source cannot be shown, None for each that can."""
        return self.map("faults", keys, side, label="look at images")

    def score(self, items: list[PromptedBits], resolution: int, batch_size: int | None = None) -> list[ImageScore]:
        """Log-probability of each image's bits given its prompt, in batches of ``batch_size`` if it matters."""
        return self.map("score", items, resolution, label="score", batch_size=batch_size)

    def reward(self, items: list[PromptedBits], resolution: int, rewards: Rewards) -> list[float | None]:
        """What ``rewards`` says of each image; it runs in the workers."""
        return self.map("reward", items, resolution, ray.put(rewards), label="reward")

    def check(self, items: list[PromptedBits], resolution: int, check: Check) -> list:
        """What ``check`` says of each image and its whole prompt."""
        return self.map("check", items, resolution, ray.put(check), label="check")

    def images(self, items: list[PromptedBits], resolution: int, folder: str, names: list[str]) -> list[Path]:
        """Write each image as a PNG of that name; returns the paths."""
        named = list(zip(items, names, strict=True))
        return self.map("images", named, resolution, str(folder), label="images")

    def answer(self, questions: list[tuple[str, str]], side: int, max_new_tokens: int = 8) -> list[str]:
        """Answer in words to each (image key, question)."""
        return self.map("answer", questions, side, max_new_tokens, label="answer")

    def reply(self, texts: list[str], max_new_tokens: int) -> list[str | None]:
        """What the model says to each drawing request before it begins an image; None where it begins none."""
        return self.map("reply", texts, max_new_tokens, label="reply")

    def map(self, method: str, items: list, *args: Any, label: str, batch_size: int | None = None) -> list:
        """``method(batch, *args)`` of the workers over all items, in batches; exactly one result an item, in order.

        RuntimeError after more than ``max_restarts`` deaths; an exception of the method itself comes through at once.
        """
        size = batch_size or self.config.batch_size
        batches = [items[at : at + size] for at in range(0, len(items), size)]
        waiting, results, seconds = deque(range(len(batches))), {}, []
        self._job += 1
        with tqdm(total=len(items), desc=label, file=sys.stderr, disable=self.progress is not None) as bar:
            while len(results) < len(batches):
                self._late_after = max(LATE_S, LATE * median(seconds)) if seconds and method in REPEATABLE else inf
                late = self._late_batches(results)
                for worker in self._idle():
                    if waiting:
                        batch = waiting.popleft()
                    elif late:
                        batch = late.popleft()
                        self.repeated += 1
                    else:
                        break
                    ref = getattr(worker, method).remote(batches[batch], *args)
                    self._running[ref] = _Call(worker, self._job, batch, time.monotonic())
                for call, outcome in self._settle(results):
                    needed = call.job == self._job and call.batch not in results
                    if outcome is None:
                        if needed and not self._copies(call.batch):
                            waiting.appendleft(call.batch)
                        self._replace(call.worker, label)
                    elif needed and isinstance(outcome, Exception):
                        raise outcome
                    elif needed:
                        seconds.append(time.monotonic() - call.since)
                        results[call.batch] = outcome
                        bar.update(len(outcome))
                        if self.progress:
                            self.progress(label, sum(map(len, results.values())), len(items))
        self._late_after = 0.0  # what now still runs, nobody waits for
        return [result for batch in range(len(batches)) for result in results[batch]]

    def _idle(self) -> list[ActorHandle]:
        busy = {begun.worker for begun in (*self._running.values(), *self._starting.values())}
        return [worker for worker in self._workers if worker not in busy]

    def _copies(self, batch: int) -> list[_Call]:
        """The calls that are at work on a batch."""
        return [call for call in self._running.values() if (call.job, call.batch) == (self._job, batch)]

    def _alone(self, done: Container[int]) -> list[_Call]:
        """The calls for batches that only one worker has, and that are not ``done``."""
        calls = [call for call in self._running.values() if call.job == self._job and call.batch not in done]
        workers = Counter(call.batch for call in calls)
        return [call for call in calls if workers[call.batch] == 1]

    def _late_batches(self, done: Container[int]) -> deque[int]:
        """Batches that only a straggler has, to be given to another worker too; the first result counts."""
        now = time.monotonic()
        return deque(call.batch for call in self._alone(done) if now - call.since >= self._late_after)

    def _settle(self, done: Container[int]) -> list[tuple[_Call, list | Exception | None]]:
        """Wait for news; what is over, off the books: calls with their results or errors, None for a lost worker."""
        limit, now = self.config.call_timeout_s, time.monotonic()
        ends = [begun.since + limit for begun in (*self._running.values(), *self._starting.values())]
        if self._idle():
            ends += [call.since + self._late_after for call in self._alone(done)]
        ready, _ = ray.wait([*self._running, *self._starting], timeout=max(0.0, min(ends) - now))
        settled: list[tuple[_Call, list | Exception | None]] = []
        for ref in ready:
            if ref in self._starting:
                self._started(ref)
                continue
            call = self._running.pop(ref)
            try:
                settled.append((call, ray.get(ref)))
            except LOST:
                settled.append((call, None))
            except Exception as error:
                settled.append((call, error))
        now = time.monotonic()
        for start in [start for start in self._starting.values() if now - start.since >= limit]:
            self._replace(start.worker, "starting")
        late = [ref for ref, call in self._running.items() if now - call.since >= limit]
        return settled + [(self._running.pop(ref), None) for ref in late]

    # Weights

    def publish(self, path: Path, version: int) -> SwapReport:
        """Swap a safetensors file into every worker. ValueError unless ``version`` is above the last one.

        An earlier set whose names are all in this one is superseded; the others' files must stay where they are.
        """
        if version <= self.version:
            raise ValueError(f"version {version} published after version {self.version}: versions only grow")
        start = time.perf_counter()
        layout, expected = layout_of(path, self.takes), checksum(path, self.takes)
        weight_set = _WeightSet(version, expected, layout, Path(path).resolve())
        self._published = [old for old in self._published if not old.layout.shapes.keys() <= layout.shapes.keys()]
        self._published.append(weight_set)
        self.version = version
        answers = self._broadcast(weight_set) if self.config.transport == "broadcast" else None
        answers = answers or self._every("receive", version, expected, self._parcel(weight_set))
        seconds = time.perf_counter() - start
        verified = all((answer["version"], answer["checksum"]) == (version, expected) for answer in answers)
        return SwapReport(
            version, expected, layout.bytes, seconds, layout.bytes / seconds / 1e9, len(answers), verified
        )

    def _parcel(self, weight_set: _WeightSet) -> WeightTransfer:
        """The set for one worker, whenever it comes for it."""
        layout, path = weight_set.layout, weight_set.path
        if self.config.transport == "shared_fs":
            return SharedFileTransfer(layout, path)
        if self.config.transport == "object_store":
            return ObjectStoreTransfer(layout, path, self._shelf)
        return AutoTransfer(layout, path, self._shelf, path.stat().st_size)

    def _broadcast(self, weight_set: _WeightSet) -> list[dict] | None:
        """The workers' answers, or None where one was lost or did not come: the others then have a part of the set."""
        device, limit = "cuda" if self.plan.use_gpu else "cpu", self.config.call_timeout_s
        version, expected, layout, path = weight_set
        try:
            address = ray.get(self._workers[0].address.remote(), timeout=limit)
            refs = [
                worker.receive.remote(
                    version,
                    expected,
                    BroadcastTransfer(layout, path, address, rank, len(self._workers), device, BROADCAST_TIMEOUT_S),
                )
                for rank, worker in enumerate(self._workers)
            ]
            return ray.get(refs, timeout=limit)
        except (*LOST, GetTimeoutError, RayTaskError) as error:
            self._tell(f"broadcast of version {version} failed, sent to each: {str(error).splitlines()[-1]}")
            return None

    def probe(self, prompt: Prompt, bits: bytes, resolution: int) -> list[float]:
        """The same image's log-probability from every worker: equal numbers where the weights are equal."""
        return [scores[0].total for scores in self._every("score", [(prompt, bits)], resolution)]

    # Workers

    def status(self) -> list[dict[str, int | str]]:
        """Version, checksum, process, place and health of every worker, as soon as all have answered."""
        answers = self._every("status")
        return [answer | {"health": state} for answer, state in zip(answers, self.health(), strict=True)]

    def health(self) -> list[State]:
        """The state of every worker as far as it is known, at once."""
        now, states = time.monotonic(), dict.fromkeys(self._workers, State.HEALTHY)
        over = {ref for ref in (*self._running, *self._starting) if ray.wait([ref], timeout=0)[0]}
        for ref, call in self._running.items():
            if ref not in over and (call.job != self._job or now - call.since >= self._late_after):
                states[call.worker] = State.SUSPECT
        for ref, start in self._starting.items():
            loaded = ray.wait([start.loaded], timeout=0)[0]
            if ref not in over:
                states[start.worker] = State.STALE if loaded and start.replayed else State.RESTARTING
        return [State.DEAD if worker in self._dead else state for worker, state in states.items()]

    def close(self) -> None:
        """End the workers."""
        for actor in (*self._workers, self._shelf):
            ray.kill(actor)
        self._workers, self._published = [], []

    def _every(self, method: str, *args: Any) -> list:
        """One call to every worker, all at once; a lost one's place is taken, and answered, by its replacement."""
        calls = [(worker, getattr(worker, method).remote(*args)) for worker in self._workers]
        answers = []
        for worker, ref in calls:
            while True:
                try:
                    answers.append(ray.get(ref, timeout=self._patience(worker)))
                    break
                except (*LOST, GetTimeoutError):
                    worker = self._replace(worker, method)
                    ref = getattr(worker, method).remote(*args)
        return answers

    def _patience(self, worker: ActorHandle) -> float:
        """How long a worker may take for its answer; what it is still at counts."""
        now = time.monotonic()
        since = min((call.since for call in self._running.values() if call.worker == worker), default=now)
        return max(0.0, since + self.config.call_timeout_s - now)

    def _start(self, place: int) -> ActorHandle:
        """A new worker; calls to it queue behind its replay of the published sets."""
        plan = self.plan
        options = {**plan.worker_options, "runtime_env": {"env_vars": {"HF_HUB_OFFLINE": "1"}}}
        if self._places:
            options["scheduling_strategy"] = self._places[place]
        worker = self.kind.options(**options).remote(
            self._checkpoint, self._source, plan.threads_per_worker, plan.use_gpu, plan.bf16, self.version
        )
        loaded = worker.status.remote()
        replayed = [worker.receive.remote(old.version, old.checksum, self._parcel(old)) for old in self._published]
        self._starting[worker.status.remote()] = _Start(worker, loaded, replayed, time.monotonic())
        return worker

    def _started(self, ref: ray.ObjectRef) -> None:
        """A worker has come up, or died trying. An error of the replay is raised: its weights are not the published."""
        start = self._starting.pop(ref)
        try:
            ray.get([*start.replayed, ref])
        except LOST:
            self._replace(start.worker, "starting")

    def _tell(self, event: str, restart: bool = False) -> None:
        self.events.append(event)
        self.note(event, restart)

    def _replace(self, worker: ActorHandle, during: str) -> ActorHandle:
        """Make sure that a lost worker is gone and start another in its place. RuntimeError after too many."""
        ray.kill(worker)
        self._starting = {ref: start for ref, start in self._starting.items() if start.worker != worker}
        self._running = {ref: call for ref, call in self._running.items() if call.worker != worker}
        self.restarts += 1
        place = self._workers.index(worker)
        limit = self.config.max_restarts
        self._tell(f"worker {place} lost during {during}: restart {self.restarts} of {limit}", restart=True)
        if self.restarts > limit:
            self._dead.add(worker)
            raise RuntimeError(f"more than {limit} rollout workers lost: {'; '.join(self.events)}")
        self._workers[place] = self._start(place)
        return self._workers[place]
