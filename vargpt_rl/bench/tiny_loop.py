"""The loop's own processes and steps on the embedded model, one thread each, for benchmarks that time single steps."""

from dataclasses import replace

from actors.cluster import connect, nodes, reserve
from actors.pool import RolloutPool
from actors.resources import plan
from learners.group import LearnerGroup
from vargpt_rl.driver.rollout import Rollouts
from vargpt_rl.driver.steps import Steps
from vargpt_rl.loop import prepare


def start(folder: str, resolution: int, *arguments: str) -> Steps:
    """One worker, one learner rank, and SFT weights to begin with: two steps, with a checkpoint halfway."""
    config, _, inputs, run = prepare(
        [
            *(f"runs={folder}", "name=bench", "stages=[align]", "iterations=1", f"resolutions=[{resolution}]"),
            *("rollout.workers=1", "learner.ranks=1", "tracking.wandb=disabled"),
            *("sft.records=16", "sft.recipe.steps=2", "sft.recipe.batch=8", "sft.recipe.micro_batch=8"),
            *arguments,
        ]
    )
    connect()
    placement = replace(plan(nodes(), config.rollout, 1, placement=config.placement), threads_per_worker=1)
    workers, ranks = reserve(placement, config.learner.start_timeout_s)
    pool = RolloutPool(config.rollout, placement, inputs.model, inputs.source, places=workers)
    learners = LearnerGroup(config.learner, placement.rank_bundle, 1, placement.use_gpu, ranks)
    steps = Steps(config, run, inputs, Rollouts(pool, inputs.source, run, inputs.quarantine, config.sampling), learners)
    steps.begin(0, resolution)
    steps.sft()
    steps.adopt("iter-00-sft")
    return steps
