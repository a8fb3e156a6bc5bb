"""The iterated SFT/DPO loop (VARGPT-v1.1, section 3.2, Fig. 6): ``python -m vargpt_rl.loop [key=value ...]``.

Every step is recorded when it is done; the same command resumes after the last one. Exit codes: 0 done, 1 failed, 2 a
setting or an input is wrong (no worker was started), 75 stopped by SIGTERM, SIGHUP or SIGUSR2 (EX_TEMPFAIL: try again)
or waiting for people's labels, 130 stopped by Ctrl-C.
"""

import os
import sys

from vargpt_rl.common.signals import Stop, handle_signals
from vargpt_rl.common.streams import make_outputs_lasting
from vargpt_rl.common.usage import command_line, print_usage_if_asked

USAGE = """\
usage: python -m vargpt_rl.loop [key=value ...]

Aligns a model by iterated SFT and preference training. The same command resumes an interrupted run.

examples:
  python -m vargpt_rl.loop                                       the demo: every stage of the embedded model
  python -m vargpt_rl.loop name=first iterations=1 'resolutions=[128]'
                                                                 a shorter run, in runs/first
  python -m vargpt_rl.loop 'align.methods=[dpo]' reward.path=null  the paper's recipe: DPO on winners alone
  python -m vargpt_rl.loop checkpoint=FOLDER experiment=NAME     your model, with settings of configs/experiment/
  python -m vargpt_rl.loop resume=runs/first                     resume a run, by its folder alone

The same as `vargpt-rl run`. Keys, their defaults and explanations: `vargpt-rl config keys`.
Results: runs/NAME/summary.json and runs/NAME/model.
Exit codes: 0 done, 1 failed, 2 a setting or an input is wrong, 75 stopped by a signal or waiting for people's labels,
130 by Ctrl-C (the same command resumes).
"""

if __name__ == "__main__":
    print_usage_if_asked(USAGE)  # before the seconds that the imports below take
    make_outputs_lasting()
    handle_signals()

from functools import partial

from ray.exceptions import RayError

from actors.cluster import connect, disconnect
from actors.resources import Placement
from configs.schema import LoopConfig
from learners.methods import ONLINE
from vargpt_rl.common.command import report_error
from vargpt_rl.common.logs import RECORD, configure_logging, end_log, keep_log
from vargpt_rl.driver.evaluation import answer_questions, draw_before, edit_images, evaluate, evaluate_stage
from vargpt_rl.driver.exported import generation_files, write_card
from vargpt_rl.driver.grids import edit_grid, sample_grid
from vargpt_rl.driver.inputs import Inputs
from vargpt_rl.driver.judging import judge
from vargpt_rl.driver.labelled import LabelsNeeded, pair_labelled, propose, waits_for_labels
from vargpt_rl.driver.learned import train_reward
from vargpt_rl.driver.online import forget_batches, train_online
from vargpt_rl.driver.origins import check_origins
from vargpt_rl.driver.own_pairs import encode_own_pairs, pair_own
from vargpt_rl.driver.pairs import pair, sample_while_training
from vargpt_rl.driver.report import show
from vargpt_rl.driver.run import Run
from vargpt_rl.driver.sampling import sample
from vargpt_rl.driver.session import Session, StageContext, Step
from vargpt_rl.driver.start import (
    base_name,
    open_session,
    place,
    plain,
    prepare,
    resume,
    starting_policy,
    write_defaults,
)
from vargpt_rl.driver.training import swap, train_control, train_dpo, train_sft, train_stage
from vargpt_rl.page.render import update_page
from vargpt_rl.stages import ALIGN, STAGES, Learns
from vargpt_rl.storage.adapter import write_adapter
from vargpt_rl.storage.checkpoint import Policy
from vargpt_rl.storage.export import best_folder, export_model, read_best

SAVE_S = 180.0
"""Seconds to let the current step finish and save after a signal. Slurm allows 300; the rest is for shutdown."""


def align(context: StageContext, policy: Policy) -> tuple[Policy, dict]:
    """Run one iteration from ``policy``; return the aligned policy and the results."""
    context.step(Step.BEFORE, draw_before, policy)
    results: dict = {"resolution": context.resolution}
    if context.config.align.sft:
        sft = context.step(Step.SFT, train_sft, policy)
        policy = context.adopt(policy, Step.SFT)
        results["sft"] = {**sft, "swap": context.step(Step.SFT_SWAP, swap, policy, sft)}
    if context.inputs.pairs is not None:
        context.step(Step.ENCODE, encode_own_pairs, policy)
    results["eval"] = {"after_sft": context.step(Step.AFTER_SFT, evaluate, policy, Step.AFTER_SFT)}
    for method in context.config.align.methods:
        policy, found = METHODS[method](context, policy)
        results |= found | {"eval": results["eval"] | found["eval"]}
    context.step(Step.GRID, sample_grid)
    return policy, results


def run_dpo(context: StageContext, policy: Policy) -> tuple[Policy, dict]:
    """Align by DPO on pairs of samples and winners, as the paper does."""
    if context.config.dpo.min_pairs:
        rollout, pairs, dpo = sample_while_training(context, policy)
    else:
        rollout, pairs = make_pairs(context, policy)
        dpo = context.step(Step.DPO, train_dpo, policy)
    control = run_control(context, policy) if context.config.dpo.control else None
    policy = context.adopt(policy, Step.DPO)
    swapped = context.step(Step.DPO_SWAP, swap, policy, dpo)
    after = context.step(Step.AFTER_DPO, evaluate, policy, Step.AFTER_DPO)
    results = {"rollout": rollout, "pairs": pairs, "dpo": {**dpo, "swap": swapped}, "swap": swapped}
    return policy, results | {"eval": {"after_dpo": after, "sft_on_winners": control}}


def make_pairs(context: StageContext, policy: Policy) -> tuple[dict, dict]:
    """Sample, judge and pair with ``policy``, once an iteration; return the results of sampling and of pairing.

    Pairs that came from files need neither samples nor winners.
    """
    if context.inputs.pairs is not None:
        return {}, context.step(Step.PAIR, pair_own, policy)
    rollout = context.step(Step.SAMPLE, sample, policy)
    judged = context.step(Step.JUDGE, judge)
    if context.config.preference.asks_people:
        context.step(Step.PROPOSE, propose, policy)
        return rollout, context.step(Step.PAIR, pair_labelled, policy, judged)
    return rollout, context.step(Step.PAIR, pair, policy, judged)


def run_control(context: StageContext, policy: Policy) -> dict:
    """Train SFT on the winners of the pairs instead of DPO, and evaluate it; the policy is not changed."""
    control = context.step(Step.CONTROL, train_control, policy)
    controlled = context.adopt(policy, Step.CONTROL)
    context.step(Step.CONTROL_SWAP, swap, controlled, control)
    return context.step(Step.AFTER_CONTROL, evaluate, controlled, Step.CONTROL)


def run_reward(context: StageContext, policy: Policy) -> tuple[Policy, dict]:
    """Learn a reward, which later methods maximise and evaluations report; the policy is not changed."""
    made = {}
    overlapped = (
        context.config.runs_dpo and context.config.dpo.min_pairs
    )  # then DPO, which precedes, has made the pairs
    if context.config.learned_reward.table is None and not overlapped:
        made["rollout"], made["pairs"] = make_pairs(context, policy)
    learned = context.step(Step.REWARD, train_reward, policy)
    context.drop_resume_state(Step.REWARD)
    return policy, made | {"learned_reward": learned, "eval": {}}


def run_online(context: StageContext, policy: Policy, method: str) -> tuple[Policy, dict]:
    """Align by an online method, on rewards of the policy's own images."""
    trained = context.step(method, train_online, policy, method)
    forget_batches(context, method)
    policy = context.adopt(policy, method)
    swapped = context.step(f"{method}_swap", swap, policy, trained)
    after = context.step(f"after_{method}", evaluate, policy, f"after_{method}")
    return policy, {method: {**trained, "swap": swapped}, "eval": {f"after_{method}": after}}


METHODS = {"dpo": run_dpo, "reward": run_reward} | {name: partial(run_online, method=name) for name in ONLINE}
"""Alignment methods of an iteration, by the names in ``align.methods``."""


def run_stage(context: StageContext, policy: Policy) -> tuple[Policy, dict]:
    """Run a stage outside the iterations from ``policy``; return the trained policy and the results."""
    edits = STAGES[context.name].learns is Learns.EDITS
    before = {"before": context.step("before", edit_images, policy, "before")} if edits else {}
    trained = context.step("", train_stage, policy)
    policy = context.adopt(policy)
    swapped = context.step("swap", swap, policy, trained)
    measured = context.step("eval", evaluate_stage, policy)
    if edits:
        context.step("grid", edit_grid)
    return policy, {"resolution": context.resolution, **trained, "swap": swapped, **before, "eval": measured}


def execute(session: Session) -> dict:
    """Run all stages in order and export the model; return the summary."""
    config = session.config
    policy = starting_policy(session)
    stages: dict[str, dict] = {}
    iterations: list[dict] = []
    understanding: dict[str, dict] = {}
    for name in config.stages:
        if name != ALIGN:
            resolution = STAGES[name].resolutions(config.resolutions)[0]
            policy, stages[name] = run_stage(session.stage(name, resolution), policy)
            continue
        asked = session.stage("understands", config.resolutions[0])
        known = stages.get("understanding", {}).get("eval")  # the same questions and weights
        understanding["before"] = known or asked.step("before", answer_questions, policy)
        for k in range(config.iterations):
            policy, results = align(session.iteration(k), policy)
            iterations.append(results)
        understanding["after"] = asked.step("after", answer_questions, policy)
    files = generation_files(config, policy.model, config.last_resolution)
    export_model(policy, session.run.directory / "model", files)
    if policy.adapter is not None:
        write_adapter(policy, session.run.directory / "adapter", base_name(session), files)
    folders = {size: best_folder(session.run.directory, size) for size in dict.fromkeys(config.resolutions)}
    best = [{"path": f"best/{size}", **note} for size, at in folders.items() if (note := read_best(at))]
    return {
        "status": "complete",
        "seconds": session.run.seconds,
        "stages": stages,
        "iterations": iterations,
        "understanding": understanding,
        "best": best,
        "quarantined": dict(session.inputs.quarantine.counts),
        "restarts": session.run.state["restarts"],
        "events": session.run.state["events"],
    }


def start(arguments: list[str]) -> int:
    """Run the loop; return the exit code. SystemExit if a signal ends it, see ``vargpt_rl.common.signals.stop``."""
    try:
        config, inputs, run = prepare(arguments)
    except ValueError as error:
        report_error(error)
        return 2
    if run.summary is not None:
        print("this run is complete; another name=... starts a new one")
        show(run.summary, run.directory)
        return 0
    Stop.resume = f"to resume: {command_line('resume', run.directory)}"
    log = keep_log(run.directory)
    try:
        return begin(config, inputs, run)
    except (Exception, SystemExit) as error:
        code = error.code if isinstance(error, SystemExit) else Stop.code
        if code is None:
            RECORD.exception("the run failed")
        else:
            caught = isinstance(error, Exception)  # a library made another error of the exit
            RECORD.info("stopping with exit code %s; %s", code, Stop.resume, exc_info=caught)
        raise
    finally:
        end_log(log)


def begin(config: LoopConfig, inputs: Inputs, run: Run) -> int:
    """Start Ray and run or resume all stages; return the exit code. SystemExit as `start`."""
    resume(run)
    try:
        check_origins(run, config, inputs)
        waiting = waits_for_labels(config, run)  # before the seconds that a cluster takes
    except ValueError as error:  # another starting model, damaged labels
        return refuse(error, 2)
    if waiting:
        return wait_for_people(waiting)
    run.progress.say("starting Ray")
    try:
        connect()
    except (OSError, RuntimeError, ValueError, RayError) as error:
        return refuse(f"no Ray cluster: {error}", 1)
    try:
        placement = place(config, inputs, run)
    except ValueError as error:
        return refuse(error, 2)
    return run_to_end(config, inputs, run, placement)


def refuse(error: Exception | str, code: int) -> int:
    """Report an error on stderr and in the run's log; return the exit code."""
    report_error(error)
    RECORD.info("error: %s", error)
    return code


def wait_for_people(notice: object) -> int:
    """Say which labels the run waits for, in its log too; return the exit code."""
    print(notice, flush=True)
    RECORD.info("%s", notice)
    return os.EX_TEMPFAIL


def run_to_end(config: LoopConfig, inputs: Inputs, run: Run, placement: Placement) -> int:
    """Run all stages on the cluster, and leave it however they end; return the exit code.

    SystemExit if a signal ends them; a training stage under way has then saved a checkpoint.
    """
    run.track(config.tracking.wandb, config.tracking.project, plain(config))
    write_defaults(run)
    run.on_step = partial(update_page, run.directory)
    failed = True
    session = None
    try:
        session = open_session(config, inputs, run, placement)
        summary = execute(session)
        write_card(run.directory / "model", run.directory, config, summary)
        run.finish(summary)
        run.progress.close()
        show(summary, run.directory)
        failed = False
    except LabelsNeeded as needed:
        failed = False
        run.progress.close()
        return wait_for_people(needed)
    except (Exception, SystemExit):
        if Stop.code is not None and session is not None:
            session.learners.checkpoint(SAVE_S)
        raise
    finally:
        run.save()
        update_page(run.directory, ended=True)
        run.close(failed)
        disconnect()
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the loop; return the exit code, that of the signal too if a library made another error of it."""
    arguments = sys.argv[1:] if arguments is None else arguments
    print_usage_if_asked(USAGE, arguments)
    configure_logging()
    try:
        code = start(arguments)
    except SystemExit:  # raised by ``stop``; within a call of Ray its status is lost
        return Stop.code or os.EX_TEMPFAIL
    except Exception:
        if Stop.code is None:
            raise
        return Stop.code
    if code and Stop.code is not None:
        return Stop.code
    return code


if __name__ == "__main__":
    sys.exit(main())
