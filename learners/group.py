"""A learner group: ranks as Ray actors in one placement group, driven as one.

Every job goes to all ranks; the driver follows the main rank's log while it waits. A rank that dies takes the job with
it: the group is torn down and the job's error says so, with nothing half written (see ``vargpt_rl.checkpoint``).
"""

import json
from collections.abc import Callable, Generator
from pathlib import Path

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from actors.cluster import Place
from learners.config import LearnerConfig
from learners.jobs import DpoJob, SftJob, TokenizerJob

OnLog = Callable[[dict], None]
Work = Generator[list[ray.ObjectRef], None, dict]
"""A job under way: it looks after the ranks, offers what is worth waiting for, and in the end has the result."""


class Training:
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
    """Ranks that train together, in ``places`` or, without them, wherever there is room for a bundle each."""

    def __init__(
        self,
        config: LearnerConfig,
        bundle: dict[str, float],
        threads: int,
        use_gpu: bool,
        places: list[Place] | None = None,
    ):
        from learners.rank import Rank  # here, for the driver needs DeepSpeed only once its settings are known good

        self.group = None if places else placement_group([bundle] * config.ranks, strategy="PACK")
        if self.group and not self.group.wait(config.start_timeout_s):
            remove_placement_group(self.group)
            raise RuntimeError(f"no room for {config.ranks} learner ranks of {bundle} in {config.start_timeout_s} s")
        places = places or [Place(self.group, i) for i in range(config.ranks)]
        self.ranks = [
            ray.remote(Rank)
            .options(
                num_cpus=bundle.get("CPU", 0),
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=places[i],
            )
            .remote(i, config.ranks, threads, use_gpu, config.bf16, config.save_every)
            for i in range(config.ranks)
        ]
        host, port = ray.get(self.ranks[0].address.remote(), timeout=config.start_timeout_s)
        self.pids = ray.get([rank.join.remote(host, port) for rank in self.ranks], timeout=config.start_timeout_s)

    def sft(self, job: SftJob, on_log: OnLog) -> dict:
        """Run a supervised job on all ranks; the main rank's result."""
        return Training(self._run("sft", job, on_log)).result()

    def dpo(self, job: DpoJob, on_log: OnLog) -> dict:
        """Run a preference job on all ranks; the main rank's result."""
        return self.start_dpo(job, on_log).result()

    def start_dpo(self, job: DpoJob, on_log: OnLog) -> Training:
        """The same, without waiting for it."""
        return Training(self._run("dpo", job, on_log))

    def tokenizer(self, job: TokenizerJob, on_log: OnLog) -> dict:
        """Train the image tokenizer, on the main rank alone."""
        return Training(self._run("tokenizer", job, on_log, self.ranks[:1])).result()

    def _run(self, method: str, job: SftJob | DpoJob | TokenizerJob, on_log: OnLog, ranks: list | None = None) -> Work:
        log = _Follower(job.output / "log.jsonl", on_log)
        waiting = [getattr(rank, method).remote(job) for rank in ranks or self.ranks]
        results = list(waiting)
        while waiting:
            yield waiting
            done, waiting = ray.wait(waiting, timeout=0)
            log.poll()
            for reference in done:
                try:
                    ray.get(reference)
                except Exception:
                    self.close()  # the other ranks wait for the lost one in a collective call
                    raise
        return ray.get(results[0])

    def close(self) -> None:
        """Stop all ranks and give their place back, where it is their own."""
        for rank in self.ranks:
            ray.kill(rank)
        if self.group:
            remove_placement_group(self.group)


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
