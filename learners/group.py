"""A learner group: ranks as Ray actors in one placement group, driven as one.

Every job goes to all ranks; the driver follows the main rank's log while it waits. A rank that dies takes the others
with it, which wait for it in a collective call: all are started again, and the job goes on from its last training
checkpoint. Errors of the job itself are not retried: they reach the caller as they were raised.
"""

import json
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
from learners.jobs import DpoJob, SftJob, TokenizerJob, asked_to_save, training_checkpoints

OnLog = Callable[[dict], None]
Work = Generator[list[ray.ObjectRef], None, dict]
"""A job under way: it looks after the ranks, offers what is worth waiting for, and in the end has the result."""

SETTLE_S = 30.0
"""How long, after one rank's error, the others may take to end too. A lost rank's peers fail within a second, but Ray
may need half a minute to notice that a whole node is gone."""


class RunningJob:
    """A job that runs beside other work of the driver's, which looks at it from time to time."""

    def __init__(self, work: Work):
        self.work, self.value = work, None
        self.look()

    def look(self) -> list[ray.ObjectRef]:
        """Follow its log, and raise its errors; what it waits for, nothing when it is done."""
        try:
            return next(self.work)
        except StopIteration as end:
            self.value = self.value or end.value
            return []

    def result(self) -> dict:
        """Wait for its end; the main rank's result."""
        while waiting := self.look():
            ray.wait(waiting, timeout=0.5)
        return self.value


class LearnerGroup:
    """Ranks that train together, in ``places`` or, without them, wherever there is room for a bundle each.

    ``restarts`` counts how often they were started again, ``note`` is told why, and of checkpoints that were refused.
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
        self.config, self.bundle, self.threads, self.use_gpu, self.note = config, bundle, threads, use_gpu, note
        self.group = None if places else placement_group([bundle] * config.ranks, strategy="PACK")
        if self.group and not self.group.wait(config.start_timeout_s):
            remove_placement_group(self.group)
            raise RuntimeError(f"no room for {config.ranks} learner ranks of {bundle} in {config.start_timeout_s} s")
        self.places = places or [Place(self.group, i) for i in range(config.ranks)]
        self.restarts, self.ranks, self.pids = 0, [], []
        self.asked: Path | None = None
        self.waiting: list[ray.ObjectRef] = []
        self._start()

    def _start(self) -> None:
        from learners.rank import Rank  # here, for the driver needs DeepSpeed only once its settings are known good

        cpus, gpus, limit = self.bundle.get("CPU", 0), self.bundle.get("GPU", 0), self.config.start_timeout_s
        self.ranks = [
            ray.remote(Rank)
            .options(num_cpus=cpus, num_gpus=gpus, scheduling_strategy=place)
            .remote(i, self.config, self.threads, self.use_gpu)
            for i, place in enumerate(self.places)
        ]
        host, port = ray.get(self.ranks[0].address.remote(), timeout=limit)
        self.pids = ray.get([rank.join.remote(host, port) for rank in self.ranks], timeout=limit)

    def sft(self, job: SftJob, on_log: OnLog) -> dict:
        """Run a supervised job on all ranks; the main rank's result."""
        return RunningJob(self._run("sft", job, on_log)).result()

    def dpo(self, job: DpoJob, on_log: OnLog) -> dict:
        """Run a preference job on all ranks; the main rank's result."""
        return self.start_dpo(job, on_log).result()

    def start_dpo(self, job: DpoJob, on_log: OnLog) -> RunningJob:
        """The same, without waiting for it."""
        return RunningJob(self._run("dpo", job, on_log))

    def tokenizer(self, job: TokenizerJob, on_log: OnLog) -> dict:
        """Train the image tokenizer, on the main rank alone."""
        return RunningJob(self._run("tokenizer", job, on_log)).result()

    def checkpoint(self, timeout_s: float) -> None:
        """Have the job under way, if any, keep a checkpoint after its current step; waits so long at most."""
        if not self.waiting or self.asked is None:
            return
        self.asked.touch()
        end, working = time.monotonic() + timeout_s, self.waiting
        while working and self.asked.exists() and time.monotonic() < end:
            _, working = ray.wait(working, timeout=0.2)

    def _run(self, method: str, job: SftJob | DpoJob | TokenizerJob, on_log: OnLog) -> Work:
        """The main rank's result. RuntimeError after more than ``max_restarts`` losses of a rank."""
        limit = self.config.max_restarts
        while True:
            try:
                if not self.ranks:
                    self._start()
                return (yield from self._attempt(method, self._resumed(job), on_log))
            except LOST as error:
                self._stop()
                self.restarts += 1
                self.note(f"learner rank lost during {method}: restart {self.restarts} of {limit}", restart=True)
                if self.restarts > limit:
                    self.close()
                    raise RuntimeError(f"a learner rank was lost more than {limit} times, now in {method}") from error
            except Exception:
                self.close()
                raise

    def _resumed(self, job: SftJob | DpoJob | TokenizerJob) -> SftJob | DpoJob | TokenizerJob:
        """The job, from where an earlier attempt at it left off."""
        if isinstance(job, TokenizerJob):
            return job
        checkpoint, refused = last_checkpoint(training_checkpoints(job.output))
        for reason in refused:
            self.note(f"{reason}; going on from {checkpoint.name if checkpoint else 'the start of the stage'}")
        return replace(job, resume=checkpoint)

    def _attempt(self, method: str, job: SftJob | DpoJob | TokenizerJob, on_log: OnLog) -> Work:
        """Raises what a rank raised; where one was lost, that, although its peers may have failed before."""
        log, alone = _Follower(job.output / "log.jsonl", on_log), isinstance(job, TokenizerJob)
        self.asked = None if alone else asked_to_save(job.output)
        if self.asked:
            self.asked.unlink(missing_ok=True)
        results = [getattr(rank, method).remote(job) for rank in (self.ranks[:1] if alone else self.ranks)]
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
        """Stop all ranks and give their place back, where it is their own."""
        self._stop()
        if self.group:
            remove_placement_group(self.group)


def _error(reference: ray.ObjectRef) -> Exception | None:
    """What a call raised; None where it did not, or is not over."""
    try:
        ray.get(reference, timeout=0)
    except GetTimeoutError:
        return None
    except Exception as error:
        return error
    return None


class _Follower:
    """Reads the lines that another process appends to a file."""

    def __init__(self, path: Path, on_log: OnLog):
        self.path, self.on_log, self.offset = path, on_log, 0
        path.unlink(missing_ok=True)

    def poll(self) -> None:
        if not self.path.exists():
            return
        with self.path.open() as file:
            file.seek(self.offset)
            while (line := file.readline()).endswith("\n"):
                self.offset = file.tell()
                self.on_log(json.loads(line))
