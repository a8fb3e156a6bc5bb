"""A learner group: ranks as Ray actors in one placement group, driven as one.

Every job goes to all ranks; the driver follows the main rank's log while it waits. When a rank dies, its peers hang in
a collective call: all ranks are restarted and the job resumes from its last training checkpoint. Errors of the job
itself are not retried: they reach the caller as raised.
"""

import json
import os
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import placement_group, remove_placement_group

from actors.cluster import LOST, Note, Place, unnoted
from learners.checkpoints import last_checkpoint
from learners.config import LearnerConfig
from learners.jobs import Job, TokenizerJob, save_request, training_checkpoints

OnLog = Callable[[dict], None]
JobSteps = Generator[list[ray.ObjectRef], None, dict]
"""Generator that drives a job: yields the refs to wait on, returns the main rank's result."""

SETTLE_S = 30.0
"""Longest wait for the other ranks to end after one rank's error. The peers of a lost rank fail within a second, but
Ray may need half a minute to notice that a whole node is gone."""


class RunningJob:
    """A job that runs beside other work of the driver, which polls it with `look`."""

    def __init__(self, steps: JobSteps):
        self.steps = steps
        self.value: dict | None = None
        self.look()

    def look(self) -> list[ray.ObjectRef]:
        """Follow the job's log and raise its errors. Returns the refs to wait on, none once the job is done."""
        try:
            return next(self.steps)
        except StopIteration as end:
            self.value = self.value or end.value
            return []

    def wait(self, timeout_s: float) -> bool:
        """Follow the job's log after at most ``timeout_s``; False once the job is done."""
        if waiting := self.look():
            ray.wait(waiting, timeout=timeout_s)
        return bool(self.look())

    def result(self) -> dict:
        """Wait for the end of the job; returns the main rank's result."""
        while self.wait(0.5):
            pass
        assert self.value is not None  # a job ends with a result or raises
        return self.value


class LearnerGroup:
    """Ranks that train together, in ``places`` or, by default, in a placement group of their own.

    ``restarts`` counts restarts of lost ranks. ``note`` is told the reason of each, and of each refused checkpoint.
    """

    def __init__(
        self,
        config: LearnerConfig,
        bundle: dict[str, float],
        threads: int,
        use_gpu: bool,
        places: list[Place] | None = None,
        note: Note = unnoted,
    ):
        self.config = config
        self.bundle = bundle
        self.threads = threads
        self.use_gpu = use_gpu
        self.note = note
        self.group = None if places else placement_group([bundle] * config.ranks, strategy="PACK")
        if self.group and not self.group.wait(config.start_timeout_s):
            remove_placement_group(self.group)
            raise RuntimeError(f"no room for {config.ranks} learner ranks of {bundle} in {config.start_timeout_s} s")
        self.places = places or [Place(self.group, i) for i in range(config.ranks)]
        self.restarts = 0
        self.ranks: list[ray.actor.ActorHandle] = []
        self.pids: list[int] = []
        self.save_request: Path | None = None
        self.waiting: list[ray.ObjectRef] = []
        self._start_ranks()

    def _start_ranks(self) -> None:
        if not self.use_gpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found none
        from learners.rank import Rank  # imports DeepSpeed, which the driver needs only once its settings are valid

        limit = self.config.start_timeout_s
        self.ranks = [
            ray.remote(Rank)
            .options(num_cpus=self.bundle.get("CPU", 0), num_gpus=self.bundle.get("GPU", 0), scheduling_strategy=place)
            .remote(i, self.config, self.threads, self.use_gpu)
            for i, place in enumerate(self.places)
        ]
        host, port = ray.get(self.ranks[0].address.remote(), timeout=limit)
        self.pids = ray.get([rank.join.remote(host, port) for rank in self.ranks], timeout=limit)

    def run(self, job: Job, on_log: OnLog) -> dict:
        """Run a job to its end; returns the main rank's result."""
        return self.start(job, on_log).result()

    def start(self, job: Job, on_log: OnLog) -> RunningJob:
        """Start a job without waiting for it."""
        return RunningJob(self._steps(job, on_log))

    def checkpoint(self, timeout_s: float) -> None:
        """Ask the running job, if any, to save a checkpoint after its current step; wait at most ``timeout_s``."""
        if not self.waiting or self.save_request is None:
            return
        log = self.save_request.with_name("log.jsonl")
        if not log.exists() or not log.stat().st_size:  # no step is done yet: there is nothing to save
            return
        self.save_request.touch()
        end = time.monotonic() + timeout_s
        working = self.waiting
        while working and self.save_request.exists() and time.monotonic() < end:
            _, working = ray.wait(working, timeout=0.2)

    def _steps(self, job: Job, on_log: OnLog) -> JobSteps:
        """Attempts at a job. RuntimeError after more than ``max_restarts`` losses of a rank."""
        limit = self.config.max_restarts
        while True:
            try:
                if not self.ranks:
                    self._start_ranks()
                return (yield from self._attempt(self._resumed(job), on_log))
            except LOST as error:
                self._stop()
                self.restarts += 1
                self.note(f"learner rank lost during {job.kind}: restart {self.restarts} of {limit}", restart=True)
                if self.restarts > limit:
                    self.close()
                    raise RuntimeError(f"a learner rank was lost more than {limit} times, now in {job.kind}") from error
            except Exception:
                self.close()
                raise

    def _resumed(self, job: Job) -> Job:
        """The job, set to resume from the last good training checkpoint of an earlier attempt."""
        if isinstance(job, TokenizerJob):
            return job
        checkpoint, refused = last_checkpoint(training_checkpoints(job.output))
        for reason in refused:
            self.note(f"{reason}; resuming from {checkpoint.name if checkpoint else 'the start of the stage'}")
        return replace(job, resume=checkpoint)

    def _attempt(self, job: Job, on_log: OnLog) -> JobSteps:
        """One attempt. If a rank was lost, raises that error even if its peers failed first."""
        alone = isinstance(job, TokenizerJob)
        log = LogFollower(job.output / "log.jsonl", on_log)
        self.save_request = None if alone else save_request(job.output)
        if self.save_request:
            self.save_request.unlink(missing_ok=True)
        results = [rank.run.remote(job) for rank in (self.ranks[:1] if alone else self.ranks)]
        self.waiting = list(results)
        while self.waiting:
            yield self.waiting
            done, self.waiting = ray.wait(self.waiting, timeout=0)
            log.poll()
            if any(map(_error, done)):
                ray.wait(results, num_returns=len(results), timeout=SETTLE_S)
                errors = list(filter(None, map(_error, results)))
                raise next((error for error in errors if isinstance(error, LOST)), errors[0])
        return ray.get(results[0])

    def _stop(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)
        self.ranks = []

    def close(self) -> None:
        """Stop all ranks and release the group's own resources."""
        self._stop()
        if self.group:
            remove_placement_group(self.group)


def _error(reference: ray.ObjectRef) -> Exception | None:
    """The error that a call raised; None if it succeeded or still runs."""
    try:
        ray.get(reference, timeout=0)
    except GetTimeoutError:
        return None
    except Exception as error:
        return error
    return None


class LogFollower:
    """Reads the JSON lines that another process appends to a file."""

    def __init__(self, path: Path, on_log: OnLog):
        self.path = path
        self.on_log = on_log
        self.offset = 0
        path.unlink(missing_ok=True)

    def poll(self) -> None:
        if not self.path.exists():
            return
        with self.path.open() as file:
            file.seek(self.offset)
            while (line := file.readline()).endswith("\n"):
                self.offset = file.tell()
                self.on_log(json.loads(line))
