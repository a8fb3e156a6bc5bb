"""The pool of rollout workers: splits work over them, survives their deaths, and publishes new weights to all.

A batch that is lost with its worker is given to another one. So is a batch that takes far longer than the others, once
a worker is idle: the first result counts. Errors of the work itself (a bad reward, a bad size) are not retried: they
are raised as they are.

Scheduling is in ``actors.batches``, the life of workers in ``actors.worker_group``, weight sets in
``actors.published``.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from actors.batches import BatchJob
from actors.cluster import LOST, Note, Place, unnoted
from actors.config import RolloutConfig
from actors.published import PublishedWeights, WeightSet, start_chunk_server
from actors.resources import Placement
from actors.transport import BroadcastTransfer
from actors.weights import SwapReport, every
from actors.worker import REPEATABLE, BaseWorker, Worker
from actors.worker_group import AnyWorker, State, WorkerGroup
from vargpt_rl.common.bars import progress_bar
from vargpt_rl.data.images import ImageSource
from vargpt_rl.data.samples import Prompt
from vargpt_rl.model.adapter import AdapterConfig
from vargpt_rl.model.generate import SamplingConfig

Progress = Callable[[str, int, int], None]
"""Called after every batch with (method, items done, items in all)."""

Result = TypeVar("Result")

BROADCAST_TIMEOUT_S = 60.0
"""Seconds that a worker waits for the others in a broadcast."""


class RolloutPool:
    """``plan.workers`` workers of class ``kind``, started with ``checkpoint``; returns when they are ready.

    With ``wait=False`` it returns at once, so that other processes start beside them: see ``wait_until_ready``.

    Each worker, or its replacement, runs in its one of ``places``; without them, wherever there is room. Without
    ``progress``, a bar is shown on stderr. ``note`` is called with events such as a replacement. Workers are sent those
    published tensors whose names ``takes`` accepts, and have the ``adapter`` that these belong to, if any. Not to be
    used by several threads at once.
    """

    def __init__(
        self,
        config: RolloutConfig,
        plan: Placement,
        checkpoint: str,
        source: ImageSource,
        *,
        progress: Progress | None = None,
        places: list[Place] | None = None,
        kind: type[AnyWorker] = Worker,
        takes: Callable[[str], bool] = every,
        adapter: AdapterConfig | None = None,
        note: Note = unnoted,
        wait: bool = True,
    ):
        self.progress = progress
        self.repeated = 0
        self.weights = PublishedWeights(config.transport, takes, start_chunk_server())
        self.workers = WorkerGroup(
            config,
            plan,
            kind=kind,
            checkpoint=str(checkpoint),
            adapter=adapter,
            source=source,
            weights=self.weights,
            places=places,
            note=note,
        )
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Wait until all workers have loaded their model; errors of their start are raised."""
        self.workers.wait_until_ready()

    @property
    def config(self) -> RolloutConfig:
        return self.workers.config

    @config.setter
    def config(self, config: RolloutConfig) -> None:
        self.workers.config = config

    @property
    def plan(self) -> Placement:
        return self.workers.plan

    @property
    def version(self) -> int:
        """The last published version; 0 is the checkpoint."""
        return self.weights.version

    def run(
        self, method: Callable[..., list[Result]], items: list, *args: Any, batch_size: int | None = None
    ) -> list[Result]:
        """``method(worker, batch, *args)`` over all items, in batches: one result an item, in order.

        ``method`` is a method of the workers' class: ``pool.run(Worker.score, items, resolution)``. RuntimeError after
        more than ``max_restarts`` deaths; an exception of the method itself is raised at once.
        """
        name, workers = method.__name__, self.workers
        job = BatchJob(items, batch_size or self.config.images_at_once, repeatable=method in REPEATABLE)
        args = tuple(ray.put(arg) if callable(arg) else arg for arg in args)  # rewards: sent to each node once
        with progress_bar(name=name, total=len(items), disable=self.progress is not None) as bar:
            try:
                while not job.is_done:
                    for worker, batch in zip(workers.idle(), job.next_batches(workers.calls), strict=False):
                        workers.submit(worker, job, batch, method, *args)
                    until = [job.next_late(workers.calls)] if workers.idle() else []
                    for call, outcome in workers.wait(*until):
                        if outcome is None:
                            job.put_back(call, workers.calls)
                            workers.replace(call.worker, name)
                        elif not job.needs(call):
                            continue
                        elif isinstance(outcome, Exception):
                            raise outcome
                        else:
                            job.finish(call, outcome)
                            bar.update(len(outcome))
                            if self.progress:
                                self.progress(name, job.items_done, len(items))
            finally:
                job.late_after = 0.0  # nobody waits for what is still running
                self.repeated += job.repeated
        return job.results()

    def publish(self, path: Path, version: int) -> SwapReport:
        """Swap a safetensors file into every worker. ValueError unless ``version`` is above the last one.

        A set whose names are all in a later one is superseded; the others' files must stay where they are.
        """
        start = time.perf_counter()
        weight_set = self.weights.add(path, version)
        expected, size = weight_set.checksum, weight_set.layout.bytes
        answers = self._broadcast(weight_set) if self.config.transport == "broadcast" else None
        if answers is None:
            transfer = self.weights.transfer(weight_set)
            answers = self.workers.call_all(BaseWorker.receive, version, expected, transfer)
        seconds = time.perf_counter() - start
        return SwapReport(
            version=version,
            checksum=expected,
            bytes=size,
            seconds=seconds,
            gbytes_per_s=size / seconds / 1e9,
            workers=len(answers),
            verified=all((answer["version"], answer["checksum"]) == (version, expected) for answer in answers),
        )

    def _broadcast(self, weight_set: WeightSet) -> list[dict] | None:
        """The workers' answers; None if one was lost or late, and the others then have only a part of the set."""
        device = "cuda" if self.plan.use_gpu else "cpu"
        limit = self.config.call_timeout_s
        version, expected, layout, path = weight_set
        workers = self.workers.handles
        try:
            address = ray.get(workers[0].address.remote(), timeout=limit)
            refs = []
            for rank, worker in enumerate(workers):
                transfer = BroadcastTransfer(
                    layout=layout,
                    path=path,
                    address=address,
                    rank=rank,
                    world=len(workers),
                    device=device,
                    timeout_s=BROADCAST_TIMEOUT_S,
                )
                refs.append(worker.receive.remote(version, expected, transfer))
            return ray.get(refs, timeout=limit)
        except (*LOST, GetTimeoutError, RayTaskError) as error:
            reason = str(error).splitlines()[-1]
            self.workers.tell(f"broadcast of version {version} failed, sending to each worker instead: {reason}")
            return None

    def time_batch(self, jobs: list[tuple[Prompt, int]], resolution: int, sampling: SamplingConfig) -> float:
        """Seconds in which all workers at once sample these (prompt, seed) as one batch each."""
        began = time.perf_counter()
        self.workers.call_all(Worker.generate_images, jobs, resolution, sampling, "timed")
        return time.perf_counter() - began

    def probe(self, prompt: Prompt, bits: bytes, resolution: int) -> list[float]:
        """One image's log-probability from every worker: equal numbers if their weights are equal."""
        return [scores[0].total for scores in self.workers.call_all(Worker.score, [(prompt, bits)], resolution)]

    def status(self) -> list[dict[str, int | str]]:
        """Version, checksum, process, place and health of every worker, as soon as all have answered."""
        answers = self.workers.call_all(BaseWorker.status)
        return [answer | {"health": state} for answer, state in zip(answers, self.health(), strict=True)]

    def health(self) -> list[State]:
        """The state of every worker as far as it is known, without waiting."""
        return self.workers.health()

    def close(self) -> None:
        """End the workers."""
        self.workers.close()
        ray.kill(self.weights.chunk_server)
