"""The iterated SFT/DPO loop (VARGPT-v1.1, section 3.2, Fig. 6): ``python -m vargpt_rl.loop [key=value ...]``.

Each iteration: SFT -> evaluate -> sample from the SFT checkpoints, pair with winners, score -> DPO -> swap -> evaluate.
Every step is recorded when it is done; the same command goes on after the last one. Exit codes: 0 done, 1 failed,
2 a setting or an input is wrong (no worker was started), 75 stopped by SIGTERM or SIGUSR2 (EX_TEMPFAIL: try again).
"""

import os
import sys

import ray
from omegaconf import OmegaConf
from ray.exceptions import RayError

from actors.cluster import connect, nodes, reserve
from actors.pool import RolloutPool
from actors.resources import plan
from actors.text_engine import start_text_engine
from configs.load import load_config
from configs.schema import LoopConfig
from learners.group import LearnerGroup
from vargpt_rl.common.command import report_error
from vargpt_rl.common.logs import configure_logging
from vargpt_rl.driver.inputs import Inputs, gather
from vargpt_rl.driver.report import show
from vargpt_rl.driver.rollout import Rollouts
from vargpt_rl.driver.run import Run
from vargpt_rl.driver.steps import Steps
from vargpt_rl.driver.verify import check_steps
from vargpt_rl.memory.plan import Devices, check_fits, gpu_memory, model_config
from vargpt_rl.storage.export import export_model, read_best

SAVE_S = 180.0
"""How long a signal may wait for training to come to the end of a step and to save: of Slurm's 300 s, some are needed
afterwards.
"""


def align(steps: Steps, run: Run, config: LoopConfig) -> list[dict]:
    """The iterations; what each of them measured."""
    results = []
    for k in range(config.iterations):
        steps.begin(k, config.resolutions[min(k, len(config.resolutions) - 1)])
        name = steps.name
        run.step(f"{name}/before", steps.before)
        sft = run.step(f"{name}/sft", steps.sft)
        steps.adopt(f"{name}-sft")
        after_sft = run.step(f"{name}/after_sft", lambda: steps.evaluate("after_sft", steps.weights))
        sampled = run.step(f"{name}/pairs", steps.pairs)
        dpo = run.step(f"{name}/dpo", steps.dpo)
        control = run.step(f"{name}/control", steps.control) if config.dpo.control else {"eval": None}
        steps.forget(f"{name}-control")
        steps.adopt(f"{name}-dpo")
        after_dpo = run.step(f"{name}/after_dpo", lambda: steps.evaluate("after_dpo", steps.weights))
        run.step(f"{name}/grid", steps.sample_grid)
        scores = {"after_sft": after_sft, "after_dpo": after_dpo, "sft_on_winners": control["eval"]}
        results.append(
            {"resolution": steps.resolution, "sft": sft, **sampled, "dpo": dpo, "swap": dpo["swap"], "eval": scores}
        )
    return results


def train(stage: str, steps: Steps, run: Run, config: LoopConfig) -> dict:
    """A stage before or after the iterations, and what it reaches; editing comes last, at the last resolution."""
    edits = stage == "edit"
    steps.begin(None, config.resolutions[-1 if edits else 0], stage)
    before = {"before": run.step("edit/before", lambda: steps.edits("before"))} if edits else {}
    result = run.step(stage, getattr(steps, stage))
    steps.adopt(stage)
    measured = run.step(f"{stage}/eval", lambda: steps.measure(stage))
    if edits:
        run.step("edit/grid", steps.edit_grid)
    return {"resolution": steps.resolution, **result, **before, "eval": measured}


def execute(steps: Steps, run: Run, config: LoopConfig, inputs: Inputs) -> dict:
    """All stages in order, then the model's export; the summary."""
    summary = {"status": "complete", "seconds": 0.0, "stages": {}, "iterations": [], "understanding": {}}
    for stage in config.stages:
        if stage != "align":
            summary["stages"][stage] = train(stage, steps, run, config)
            continue
        steps.begin(None, config.resolutions[0])
        known = summary["stages"].get("understanding", {}).get("eval")  # the same questions and weights
        summary["understanding"]["before"] = known or run.step("understands/before", steps.understands)
        summary["iterations"] = align(steps, run, config)
        summary["understanding"]["after"] = run.step("understands/after", steps.understands)
    export_model(inputs.model, steps.weights, run.directory / "model")
    quarantined, best = dict(inputs.quarantine.counts), read_best(run.directory / "best")
    return summary | {
        "best": best and {"path": "best", **best},
        "seconds": run.seconds,
        "quarantined": quarantined,
        "restarts": run.state["restarts"],
        "events": run.state["events"],
    }


def devices() -> Devices:
    """What Ray sees: GPUs, with the memory of the first that it gives, and the memory of all machines."""
    found = ray.cluster_resources()
    gpus = int(found.get("GPU", 0))
    each = ray.get(ray.remote(num_gpus=1)(gpu_memory).remote()) if gpus else 0
    return Devices(gpus, each, int(found["memory"] + found["object_store_memory"]))


def prepare(arguments: list[str]) -> tuple[LoopConfig, dict, Inputs, Run]:
    """The settings, also as plain values, all that they name, and the run's directory. ValueError if any is wrong."""
    config = load_config(arguments)
    settings = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return config, settings, gather(config), Run(config.directory, settings)


def start(arguments: list[str]) -> int:
    """Run the loop; the exit code. SystemExit if a signal ends it, see ``actors.cluster.stop``."""
    try:
        config, settings, inputs, run = prepare(arguments)
    except ValueError as error:
        report_error(error)
        return 2
    if run.summary is not None:
        print("this run is complete; another name=... starts a new one")
        show(run.summary, run.directory)
        return 0
    check_steps(run)
    if run.state["steps"]:
        run.note(f"going on after {list(run.state['steps'])[-1]}")
    learner = config.learner
    try:
        connect()
    except (OSError, RuntimeError, ValueError, RayError) as error:
        report_error(f"no Ray cluster: {error}")
        return 1
    try:
        shares = learner.gpus_per_rank, learner.bf16, config.placement
        placement = plan(nodes(), config.rollout, learner.ranks, *shares)
        check_fits(config, model_config(inputs.model), devices())
    except ValueError as error:
        report_error(error)
        return 2
    run.track(config.tracking.wandb, config.tracking.project, settings)
    failed, learners = True, None
    try:
        workers, ranks = reserve(placement, learner.start_timeout_s)
        note = {"note": run.note}
        pool = RolloutPool(config.rollout, placement, inputs.model, inputs.source, places=workers, **note)
        kind = placement.rank_bundle, placement.threads_per_worker, placement.use_gpu
        learners = LearnerGroup(learner, *kind, ranks, **note)
        text = start_text_engine(config.rollout, placement, inputs.model, inputs.source, **note)
        rollouts = Rollouts(pool, inputs.source, run, inputs.quarantine, config.sampling, text)
        steps = Steps(config, run, inputs, rollouts, learners)
        summary = execute(steps, run, config, inputs)
        run.finish(summary)
        show(summary, run.directory)
        failed = False
    except SystemExit:
        if learners is not None:
            learners.checkpoint(SAVE_S)
        raise
    finally:
        run.save()
        run.close(failed)
        ray.shutdown()
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the loop; the exit code."""
    configure_logging()
    try:
        return start(sys.argv[1:] if arguments is None else arguments)
    except SystemExit:  # of ``stop``; in a call of Ray its status is lost
        return os.EX_TEMPFAIL


if __name__ == "__main__":
    sys.exit(main())
