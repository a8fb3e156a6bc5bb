"""Processes that are forked from one which has imported torch, DeepSpeed and this project, and so start at once.

A process that imports them itself takes ten seconds of a core before it does anything.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any

from actors.cluster import Note, unnoted
from learners.config import LearnerConfig
from learners.group import LearnerGroup, LogFollower, OnLog, Patience
from learners.jobs import Job, TokenizerJob
from tests.helpers.faults import ask
from vargpt_rl.common.failpoints import VARIABLE
from vargpt_rl.common.network import free_port

FORKS = multiprocessing.get_context("forkserver")
"""Where processes are forked: `FORKS.Process`, `FORKS.Queue`."""
FORKS.set_forkserver_preload(["tests.helpers.one_process", "deepspeed.runtime.zero.muon.muon_optimizer"])


def run_loop(arguments: Sequence[str], *points: str, faults: Path, log: Path) -> list[list]:
    """Start the loop in one process, killed at each point in turn; a point ``end`` lets it end.

    Returns each start's point, exit code, whether the point was missed, and seconds. ``log`` gets what they print.
    """
    faults.mkdir(parents=True, exist_ok=True)
    ends = []
    for point in points:
        if point != "end":
            ask(faults, point)
        began = time.monotonic()
        start = FORKS.Process(target=_start_loop, args=(list(arguments), {VARIABLE: str(faults)}, log))
        start.start()
        start.join()
        ends.append([point, start.exitcode, (faults / point).exists(), round(time.monotonic() - began, 1)])
    return ends


def _start_loop(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    """One start, in a process of its own."""
    from tests.helpers.one_process import start

    multiprocessing.set_start_method("fork", force=True)  # for data loaders, as in a process that was not forked
    os.environ |= environment
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    start(arguments)
    os._exit(0)  # a run that has ended leaves threads that nobody needs


class OwnJob:
    """A job whose result a thread of this process gets, and whose log the caller follows."""

    def __init__(self, work: Callable[[], dict], log: LogFollower):
        self.working = ThreadPoolExecutor(1).submit(work)
        self.log = log

    def look(self) -> None:
        self.log.poll()

    def wait(self, timeout_s: float) -> bool:
        wait([self.working], min(timeout_s, 0.05))
        self.look()
        return not self.working.done()

    def result(self) -> dict:
        while self.wait(0.05):
            pass
        found = self.working.result()
        self.look()
        return found


class ForkedRanks(LearnerGroup):
    """The group's interface to ranks that are forked, without a cluster. Use as a context manager.

    ``prepare`` is called in each rank's process, before the rank is made.
    """

    def __init__(
        self, config: LearnerConfig, note: Note = unnoted, bf16: bool = False, prepare: Callable[[], None] | None = None
    ):
        self.config, self.note, self.bf16 = config, note, bf16
        self.patience = Patience(config.stall_timeout_s)
        self.members: list[tuple[Any, Connection]] = []
        address = "127.0.0.1", free_port()
        for member in range(config.ranks):
            own, other = FORKS.Pipe()
            process = FORKS.Process(target=_serve_jobs, args=(member, address, config, bf16, prepare, other))
            process.start()
            other.close()
            self.members.append((process, own))

    def __enter__(self) -> "ForkedRanks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, job: Job, on_log: OnLog) -> OwnJob:
        resumed = self._resumed(job)
        return OwnJob(lambda: self._ask(resumed), LogFollower(job.output / "log.jsonl", on_log))

    def _ask(self, job: Job) -> dict:
        """Have the ranks run a job; raise the first error of any."""
        asked = [connection for _, connection in self.members[: 1 if isinstance(job, TokenizerJob) else None]]
        for connection in asked:
            connection.send(job)
        answers: dict[Connection, dict] = {}
        while len(answers) < len(asked):
            for connection in wait_for_any([each for each in asked if each not in answers]):
                answer = connection.recv()
                if isinstance(answer, Exception):
                    raise answer
                answers[connection] = answer
        return answers[asked[0]]

    def close(self) -> None:
        for process, connection in self.members:
            process.kill()
            process.join()
            connection.close()
        self.members = []


def _serve_jobs(
    member: int,
    address: tuple[str, int],
    config: LearnerConfig,
    bf16: bool,
    prepare: Callable[[], None] | None,
    jobs: Connection,
) -> None:
    """One rank: jobs come in, results or errors go out."""
    from learners.rank import Rank

    multiprocessing.set_start_method("fork", force=True)
    if prepare is not None:
        prepare()
    rank = Rank(member, config, threads=1, use_gpu=False, bf16=bf16)
    rank.join(*address, own_address="127.0.0.1")
    while True:
        job = jobs.recv()
        try:
            answer: dict | Exception = rank.run(job)
        except Exception as error:
            answer = error
        jobs.send(answer)
