"""The loop's own processes on the embedded model, one thread each, for benchmarks that time single steps."""

from dataclasses import replace

from actors.cluster import connect
from vargpt_rl.driver.session import Session, Step
from vargpt_rl.driver.start import open_session, place, prepare
from vargpt_rl.driver.training import train_sft
from vargpt_rl.storage.checkpoint import Policy


def start(folder: str, resolution: int, *arguments: str) -> tuple[Session, Policy]:
    """Start one worker and one learner rank; return them, and a policy after two steps of SFT.

    SFT keeps a checkpoint halfway, and belongs to iteration 0.
    """
    config, inputs, run = prepare(
        [
            *(f"runs={folder}", "name=bench", "stages=[align]", "iterations=1", f"resolutions=[{resolution}]"),
            *("rollout.workers=1", "learner.ranks=1", "tracking.wandb=disabled"),
            *("sft.records=16", "sft.recipe.steps=2", "sft.recipe.batch=8", "sft.recipe.micro_batch=8"),
            *arguments,
        ]
    )
    connect()
    session = open_session(config, inputs, run, replace(place(config, inputs, run), threads_per_worker=1))
    context = session.iteration(0)
    policy = Policy(inputs.model)
    train_sft(context, policy)
    return session, context.adopt(policy, Step.SFT)
