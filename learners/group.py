"""A learner group: ranks as Ray actors in one placement group, driven as one.

Every job goes to all ranks; the driver follows the main rank's log while it waits. When a rank dies, its peers hang in
a collective call: all ranks are restarted and the job resumes from its last training checkpoint. So they are if the
log says nothing for too long while the driver waits: a rank, or a process that reads its data, then hangs. Errors of
the job itself are not retried: they reach the caller as raised.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

import psutil
import ray
import torch
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.cluster import LOST, Note, Place, kill_process, unnoted
from learners.checkpoints import last_checkpoint, read_layout
from learners.config import LearnerConfig
from learners.jobs import (
    Job,
    RankProcess,
    SftJob,
    TokenizerJob,
    TrainerJob,
    layout_of,
    save_request,
    training_checkpoints,
)
from vargpt_rl.common.network import free_port

OnLog = Callable[[dict], None]
JobSteps = Generator[list[ray.ObjectRef], None, dict]
"""Generator that drives a job: yields the refs to wait on, returns the main rank's result."""

SETTLE_S = 30.0
"""Longest wait for the other ranks to end after one rank's error. The peers of a lost rank fail within a second, but
Ray may need half a minute to notice that a whole node is gone."""


SAVES_S = 10.0
"""Seconds without any sign of a step or of writing after which ranks that were asked to save are not waited for."""

SLOWEST = 3
"""A step may take this many times as long as the longest one before it."""


class StalledError(Exception):
    """The ranks of a job make no progress."""


class Patience:
    """Judges whether a job makes progress, by the seconds that the driver has waited without a line in its log.

    Only waiting counts: an online job waits in turn for the driver, which then does other work.
    """

    def __init__(self, limit_s: float):
        self.limit_s = limit_s
        self.begin()

    def begin(self) -> None:
        """Start anew, with a job or after a restart."""
        self.longest = 0.0
        self.waited = 0.0
        self.began = False

    def wait(self, seconds: float) -> None:
        """Count a wait of the driver."""
        self.waited += seconds

    def see_progress(self) -> None:
        """Count a line of the log. What comes before the first is no step: the model is loaded."""
        if self.began:
            self.longest = max(self.longest, self.waited)
        self.began = True
        self.waited = 0.0

    def check(self) -> None:
        """Raise StalledError after more than ``limit_s`` seconds and several times the longest step."""
        if self.waited > max(self.limit_s, SLOWEST * self.longest):
            raise StalledError(f"no progress in {self.waited:.0f} s")


class RunningJob:
    """A job that runs beside other work of the driver, which polls it with `look`."""

    def __init__(self, steps: JobSteps, patience: Patience):
        self.steps = steps
        self.patience = patience
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
            began = time.monotonic()
            ray.wait(waiting, timeout=timeout_s)
            # A driver that was itself stopped has waited no longer than it meant to.
            self.patience.wait(min(time.monotonic() - began, 2 * timeout_s))
        return bool(self.look())

    def result(self) -> dict:
        """Wait for the end of the job; returns the main rank's result."""
        while self.wait(0.5):
            pass
        assert self.value is not None  # a job ends with a result or raises
        return self.value


class RankHost:
    """The actor of a rank. DeepSpeed and the trainers are imported in its process alone, not in the driver's."""

    def __init__(self, rank: int, config: LearnerConfig, threads: int, use_gpu: bool, bf16: bool):
        if not use_gpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found none
        from learners.rank import Rank

        self._rank = Rank(rank, config, threads, use_gpu, bf16)

    def address(self) -> tuple[str, int]:
        """This node's address in the cluster and a free port, where the ranks rendezvous with rank 0."""
        return ray.util.get_node_ip_address(), free_port()

    def join(self, host: str, port: int) -> RankProcess:
        """Join the process group; returns the process."""
        self._rank.join(host, port, ray.util.get_node_ip_address())
        return RankProcess(os.getpid(), ray.get_runtime_context().get_node_id(), psutil.Process().create_time())

    def run(self, job: Job) -> dict:
        return self._rank.run(job)


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
        bf16: bool,
        places: list[Place] | None = None,
        note: Note = unnoted,
    ):
        self.config = config
        self.bf16 = bf16
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
        self.processes: list[RankProcess] = []
        self.patience = Patience(config.stall_timeout_s)
        self.save_request: Path | None = None
        self.waiting: list[ray.ObjectRef] = []
        self._start_ranks()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the ranks' products and of the weights that they save."""
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def pids(self) -> list[int]:
        """The process ids of the ranks."""
        return [process.pid for process in self.processes]

    def _start_ranks(self) -> None:
        limit = self.config.start_timeout_s
        self.ranks = [
            ray.remote(RankHost)
            .options(num_cpus=self.bundle.get("CPU", 0), num_gpus=self.bundle.get("GPU", 0), scheduling_strategy=place)
            .remote(i, self.config, self.threads, self.use_gpu, self.bf16)
            for i, place in enumerate(self.places)
        ]
        try:
            host, port = ray.get(self.ranks[0].address.remote(), timeout=limit)
            self.processes = ray.get([rank.join.remote(host, port) for rank in self.ranks], timeout=limit)
        except GetTimeoutError as error:
            self._stop()
            raise RuntimeError(f"the learner ranks did not start in learner.start_timeout_s={limit:g} s") from error

    def run(self, job: Job, on_log: OnLog) -> dict:
        """Run a job to its end; returns the main rank's result."""
        return self.start(job, on_log).result()

    def start(self, job: Job, on_log: OnLog) -> RunningJob:
        """Start a job without waiting for it."""
        return RunningJob(self._steps(job, on_log), self.patience)

    def checkpoint(self, timeout_s: float) -> None:
        """Ask the running job, if any, to save a checkpoint after its current step; wait at most ``timeout_s``.

        Ranks that hang are not waited for: those that neither log nor write for several times the longest step.
        """
        if not self.waiting or self.save_request is None:
            return
        output = self.save_request.parent
        log = output / "log.jsonl"
        if not log.exists() or not log.stat().st_size:  # no step is done yet: there is nothing to save
            return
        self.save_request.touch()
        hangs_s = max(SAVES_S, SLOWEST * self.patience.longest)
        began = last = time.monotonic()
        signs = _written(output)
        working = self.waiting
        while working and self.save_request.exists() and time.monotonic() < min(began + timeout_s, last + hangs_s):
            _, working = ray.wait(working, timeout=0.2)
            if (now := _written(output)) != signs:
                signs = now
                last = time.monotonic()

    def _steps(self, job: Job, on_log: OnLog) -> JobSteps:
        """Attempts at a job. RuntimeError after more than ``max_restarts`` losses of a rank."""
        limit = self.config.max_restarts
        while True:
            try:
                if not self.ranks:
                    self._start_ranks()
                return (yield from self._attempt(self._resumed(job), on_log))
            except (*LOST, StalledError) as error:
                self._stop()
                why = ""
                if isinstance(error, StalledError):
                    self._kill_processes()
                    why = f" ({error})"
                if self.restarts >= limit:
                    self.note(f"learner rank lost during {job.kind}{why}, after {limit} restarts of at most {limit}")
                    self.close()
                    raise RuntimeError(f"a learner rank was lost more than {limit} times, now in {job.kind}") from error
                self.restarts += 1
                self.note(f"learner rank lost during {job.kind}{why}: restart {self.restarts} of {limit}", restart=True)
            except Exception:
                self.close()
                raise

    def _resumed(self, job: Job) -> Job:
        """The job, set to resume from the last good training checkpoint of an earlier attempt."""
        checkpoint, refused = last_checkpoint(training_checkpoints(job.output))
        for reason in refused:
            self.note(f"{reason}; resuming from {checkpoint.name if checkpoint else 'the start of the stage'}")
        if checkpoint is not None and not isinstance(job, TokenizerJob):
            self._tell_layout(job, checkpoint)
        return replace(job, resume=checkpoint)

    def _tell_layout(self, job: TrainerJob, checkpoint: Path) -> None:
        """Note what resuming with another layout of ranks changes."""
        before = read_layout(checkpoint)[0]
        now = layout_of(job, self.config.ranks)
        if changed := now.differences(before):
            lost = "sums are rounded in another order"
            if not now.reads_as(before) and isinstance(job, SftJob):
                lost += " and the examples that follow come in a new order"
            self.note(f"resuming {job.output.name} from {checkpoint.name} with {changed}: not bit for bit, as {lost}")

    def _attempt(self, job: Job, on_log: OnLog) -> JobSteps:
        """One attempt. If a rank was lost, raises that error even if its peers failed first."""
        alone = isinstance(job, TokenizerJob)
        log = LogFollower(job.output / "log.jsonl", on_log)
        self.save_request = save_request(job.output)
        self.save_request.unlink(missing_ok=True)
        results = [rank.run.remote(job) for rank in (self.ranks[:1] if alone else self.ranks)]
        self.waiting = list(results)
        self.patience.begin()
        while self.waiting:
            yield self.waiting
            done, self.waiting = ray.wait(self.waiting, timeout=0)
            if log.poll() or done:
                self.patience.see_progress()
            self.patience.check()
            if any(map(_error, done)):
                ray.wait(results, num_returns=len(results), timeout=SETTLE_S)
                errors = list(filter(None, map(_error, results)))
                raise next((error for error in errors if isinstance(error, LOST)), errors[0])
        return ray.get(results[0])

    def _kill_processes(self) -> None:
        """Kill the ranks' processes on their nodes: one that is stopped (SIGSTOP) does not read Ray's own request."""
        refs = [
            ray.remote(kill_process)
            .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(process.node, soft=True))
            .remote(process.pid, process.began)
            for process in self.processes
        ]
        ray.wait(refs, num_returns=len(refs), timeout=SETTLE_S)
        self.processes = []

    def _stop(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)
        self.ranks = []

    def close(self) -> None:
        """Stop all ranks and release the group's own resources."""
        self._stop()
        if self.group:
            remove_placement_group(self.group)


def _written(output: Path) -> dict[str, int]:
    """Return the size of each file that ranks write while they train and save."""
    sizes = {}
    for path in (output / "log.jsonl", *training_checkpoints(output).rglob("*")):
        with contextlib.suppress(OSError):  # renamed or deleted in between
            sizes[str(path)] = path.stat().st_size
    return sizes


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

    def poll(self) -> int:
        """Pass on the new lines; return their number."""
        count = 0
        if not self.path.exists():
            return count
        with self.path.open() as file:
            file.seek(self.offset)
            while (line := file.readline()).endswith("\n"):
                self.offset = file.tell()
                self.on_log(json.loads(line))
                count += 1
        return count
