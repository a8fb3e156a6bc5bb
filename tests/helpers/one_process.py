"""The loop with its worker and its rank in the driver's own process; `tests.helpers.forks.run_loop` starts it."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import torch

from actors.pool import RolloutPool
from actors.published import PublishedWeights
from actors.weights import every
from actors.worker import Worker
from learners.group import LearnerGroup, LogFollower, Patience
from learners.jobs import DpoJob, PolicyGradientJob
from learners.rank import Rank
from rewards.combined import KeptRewards
from tests.helpers.forks import OwnJob
from vargpt_rl import loop
from vargpt_rl.common.dtypes import chosen_dtype
from vargpt_rl.common.network import free_port
from vargpt_rl.driver import judging
from vargpt_rl.driver.labelled import LabelsNeeded
from vargpt_rl.driver.origins import check_origins
from vargpt_rl.driver.session import Session
from vargpt_rl.driver.start import prepare, resume
from vargpt_rl.driver.weights import WeightSync


class OwnWorker:
    """A group of the one worker in this process."""

    def __init__(self, config, worker: Worker):
        self.config = config
        self.worker = worker

    def call_all(self, method, *args):
        return [method(self.worker, *args)]


class OwnPool(RolloutPool):
    """A pool of the worker in this process; weights reach it as they reach one elsewhere.

    ``calls`` gets a line for each finished call of `run`: its method and the number of its items.
    """

    def __init__(self, config, worker: Worker, calls: Path):
        self.calls = calls
        self.weights = PublishedWeights(config.transport, every, chunk_server=None)
        self.workers = OwnWorker(config, worker)

    def run(self, method, items, *args, batch_size=None):
        size = batch_size or self.config.images_at_once
        batches = [items[at : at + size] for at in range(0, len(items), size)]
        results = [result for batch in batches for result in method(self.workers.worker, batch, *args)]
        with self.calls.open("a") as file:
            file.write(json.dumps([method.__name__, len(items)]) + "\n")
        return results


class OwnRewards(KeptRewards):
    """Rewards in this process."""

    def use(self, reward):
        def live(images, prompts):
            return reward(images, prompts)

        live.report = dict
        live.renewed = lambda: live
        return live


@contextmanager
def own_scorers(reward):
    """A learned reward in this process."""
    yield OwnRewards().use(reward)


class OwnRank(LearnerGroup):
    """The group's interface to a rank in this process."""

    def __init__(self, config, note, bf16):
        self.config, self.note, self.bf16 = config, note, bf16
        self.rank = Rank(0, config, threads=1, use_gpu=False, bf16=bf16)
        self.patience = Patience(config.stall_timeout_s)
        self.rank.join("127.0.0.1", free_port(), own_address="127.0.0.1")

    def start(self, job, on_log):
        """Jobs that follow what the driver makes meanwhile have a thread of their own."""
        if isinstance(job, PolicyGradientJob) or (isinstance(job, DpoJob) and job.parts > 1):
            log = LogFollower(job.output / "log.jsonl", on_log)
            return OwnJob(lambda: self.rank.run(self._resumed(job)), log)
        return super().start(job, on_log)

    def _steps(self, job, on_log):
        yield from ()  # never waits
        return self.rank.run(self._resumed(job))


def start(arguments: list[str]) -> None:
    """Run the loop as ``loop.start`` does, without a cluster."""
    torch.set_num_threads(1)
    judging.scorers = own_scorers
    config, inputs, run = prepare(arguments)
    resume(run)
    check_origins(run, config, inputs)
    bf16 = chosen_dtype(config.dtype, on_gpu=False) == torch.bfloat16
    adapter = config.adapter if config.adapter.is_on else None
    worker = Worker(inputs.model, inputs.source, threads=1, bf16=bf16, adapter=adapter)
    pool = OwnPool(config.rollout, worker, run.directory.with_name(f"{run.directory.name}-calls.jsonl"))
    session = Session(
        config=config,
        inputs=inputs,
        run=run,
        pool=pool,
        text=None,
        weights=WeightSync(pool, None, run),
        learners=OwnRank(config.learner, run.note, bf16),
        rewards=OwnRewards(),
    )
    try:
        run.finish(loop.execute(session))
    except LabelsNeeded:
        os._exit(os.EX_TEMPFAIL)
