"""Measure the simulation's costs and its error: ``python -m vargpt_rl.simulate.measure out=FILE``.

Real processes on the embedded model, one thread each: a rollout worker and a learner rank for the costs, then each of
the numbers of ``workers``, whose time for an iteration's pairs is compared with the prediction. The driver's costs are
its own CPU seconds; those of a batch are measured with idle workers, so that other processes do not affect them.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import ray
from rich.box import SIMPLE_HEAD
from rich.table import Table
from safetensors.torch import load_file

from actors.pool import RolloutPool
from actors.resources import Placement
from actors.worker import Failure, PromptedBits, Worker
from learners.jobs import DpoJob
from vargpt_rl.bench.dry_run import PAIRING, SAMPLING, enter_iteration, measure_steps
from vargpt_rl.bench.tiny_loop import start
from vargpt_rl.common.command import run_command
from vargpt_rl.common.console import print_table, wide_console
from vargpt_rl.common.settings import Count
from vargpt_rl.data.samples import Sample
from vargpt_rl.driver.judging import judge
from vargpt_rl.driver.pairs import pair
from vargpt_rl.driver.sampling import generate, plan_samples, sample
from vargpt_rl.driver.session import Session, StageContext
from vargpt_rl.driver.training import random_probe
from vargpt_rl.driver.weights import WeightSync
from vargpt_rl.simulate.costs import Costs
from vargpt_rl.simulate.iteration import Machine, Work, simulate
from vargpt_rl.storage.checkpoint import Policy, check_checkpoint, save_checkpoint

BATCHES = 4
"""Batches that are timed."""
IDLE_BATCHES = 200
"""Batches that idle workers answer."""
PAIRS = 10_000
"""Prompts of the driver's dry run: with few, imports and fixed costs would count as the cost of a pair."""
PAYLOAD = 2**16
"""Bytes per item that idle workers return."""


@dataclass
class MeasureSettings:
    """Settings of the measurement."""

    out: str = "costs.json"
    """File of costs to write."""
    resolution: Count = 128
    prompts: Count = 128
    """Prompts sampled to check the prediction."""
    workers: list[Count] = field(default_factory=lambda: [1, 2, 4])
    """Numbers of workers to check the prediction with."""

    def __post_init__(self):
        if not self.workers:
            raise ValueError("workers=[]: expected one or more")


class Idle:
    """A worker that has nothing to do."""

    def __init__(self, *args, **options):
        pass

    def status(self) -> dict[str, int | str]:
        return {}

    def answer(self, items: list, size: int) -> list[bytes]:
        return [bytes(size)] * len(items)


def timed(clock: Callable[[], float], work: Callable, *args) -> float:
    """Call ``work``; return the seconds that ``clock`` counts meanwhile."""
    began = clock()
    work(*args)
    return clock() - began


def driver_costs(context: StageContext) -> tuple[float, float]:
    """CPU seconds of the driver for a batch, and for a byte of its result."""
    pool = idle_pool(context)
    items = list(range(IDLE_BATCHES * pool.config.images_at_once))

    def work(size: int) -> float:
        return timed(time.process_time, lambda: pool.run(Idle.answer, items, size))

    work(0)
    empty, full = work(0), work(PAYLOAD)
    pool.close()
    return empty / IDLE_BATCHES, max(0.0, full - empty) / len(items) / PAYLOAD


def idle_pool(context: StageContext) -> RolloutPool:
    """Start a pool of one worker that answers at once."""
    one = Placement(workers=1, worker_options={"num_cpus": 0})
    return RolloutPool(context.config.rollout, one, context.inputs.model, context.source, kind=Idle)


def train_costs(context: StageContext, policy: Policy) -> tuple[float, float]:
    """Seconds of a micro-batch of DPO, and of a step beside its micro-batches: from steps of one and of four."""
    seconds = []
    for count in (1, 4):
        recipe = replace(context.config.dpo.recipe, steps=6, batch=count * context.config.dpo.recipe.micro_batch)
        job = DpoJob(
            start=policy,
            table=context.table(),
            recipe=recipe,
            dpo=context.config.dpo,
            output=context.checkpoint(f"costs-{count}"),
            seed=0,
            probe=random_probe(context),
        )
        result = context.session.learners.run(job, lambda line: None)
        seconds.append(result["seconds"] / recipe.steps)
    micro_batch_s = max(0.0, seconds[1] - seconds[0]) / 3
    return micro_batch_s, max(0.0, seconds[0] - micro_batch_s)


def pair_cost(folder: Path) -> float:
    """CPU seconds of the driver's own steps for a prompt among many: from planning its sample to its pair's row."""
    found = measure_steps(enter_iteration(PAIRS, folder))
    return sum(step.cpu for step in found if step.name in (SAMPLING, PAIRING)) / PAIRS


def swap_costs(context: StageContext, policy: Policy) -> tuple[float, float, int]:
    """Seconds of a swap that brings next to nothing, of a byte more, and the bytes of the SFT weights."""
    pool = context.pool
    weights = check_checkpoint(policy.weights[-1])
    name, tensor = min(load_file(weights).items(), key=lambda item: item[1].numel())
    small = check_checkpoint(save_checkpoint(context.checkpoint("small"), {name: tensor}))
    found = []
    for path in (small, weights) * 3:
        report = pool.publish(path, pool.version + 1)
        found.append((report.seconds, report.bytes))
    (least, few), (most, many) = (min(found[i::2]) for i in range(2))
    return least, max(0.0, most - least) / (many - few), many


def measure(session: Session, policy: Policy) -> Costs:
    """The costs, from a worker and a rank at work."""
    context = iteration_named(session, "costs")
    pool = context.pool
    batch = context.config.rollout.images_at_once
    side = context.resolution
    dispatch_s, byte_s = driver_costs(context)
    prompts = context.source.prompts("train", BATCHES * batch, 1)
    keys = [context.source.winner_key(prompt) for prompt in prompts]
    context.swap_to(policy)

    def draw(count: int) -> list[Sample]:
        return generate(context, prompts[:count], list(range(count)), "costs")

    draw(batch)
    samples = draw(2)
    items: list[PromptedBits] = [(prompt, samples[0].bits) for prompt in prompts]
    draw_s = timed(time.perf_counter, draw, len(prompts)) / BATCHES
    encode_s = timed(time.perf_counter, pool.run, Worker.encode, keys, side) / BATCHES
    pool.run(Worker.score, items[:2], side)
    score_s = timed(time.perf_counter, pool.run, Worker.score, items, side) / BATCHES
    make_pairs(context, policy)
    micro_batch_s, step_s = train_costs(context, policy)
    swap_s, swap_byte_s, weight_bytes = swap_costs(context, policy)
    encoded = pool.run(Worker.encode, keys[:1], side)[0]
    if isinstance(encoded, Failure):
        raise RuntimeError(f"{encoded.key}: {encoded.reason}")
    return Costs(
        batch=batch,
        micro_batch=context.config.dpo.recipe.micro_batch,
        draw_s=max(0.0, draw_s - dispatch_s),
        encode_s=max(0.0, encode_s - dispatch_s),
        score_s=max(0.0, score_s - dispatch_s),
        micro_batch_s=micro_batch_s,
        step_s=step_s,
        dispatch_s=dispatch_s,
        byte_s=byte_s,
        pair_s=pair_cost(context.run.directory),
        swap_s=swap_s,
        swap_byte_s=swap_byte_s,
        result_bytes=len(samples[0].bits),
        encoded_bytes=len(encoded.bits) + encoded.features.nbytes,
        weight_bytes=weight_bytes,
    )


def iteration_named(session: Session, name: str) -> StageContext:
    """Return an iteration whose files have a name of their own."""
    return replace(session.iteration(0), name=name)


def make_pairs(context: StageContext, policy: Policy) -> None:
    """Write an iteration's preference table."""
    sample(context, policy)
    pair(context, policy, judge(context))


def check(session: Session, policy: Policy, costs: Costs, counts: list[int]) -> list[dict]:
    """Real and predicted seconds of an iteration's pairs with so many workers, on the cores that are here."""
    cores = len(psutil.Process().cpu_affinity())
    found = []
    for count in counts:
        session.pool.close()
        placement = replace(session.pool.plan, workers=count, worker_options={"num_cpus": 0})
        pool = RolloutPool(session.config.rollout, placement, session.inputs.model, session.inputs.source)
        session = replace(session, pool=pool, weights=WeightSync(pool, None, session.run))
        context = iteration_named(session, f"check-{count}")
        real = timed(time.perf_counter, make_pairs, context, policy)
        work = Work(len(plan_samples(context, policy).prompts), 1, 1)
        predicted = simulate(costs, work, Machine(count, cores=cores)).pairs_s
        found.append({"workers": count, "seconds": real, "predicted": predicted, "error": predicted / real - 1})
    return found


def run(settings: MeasureSettings) -> None:
    """Write the costs and print both tables."""
    console = wide_console()
    with tempfile.TemporaryDirectory() as folder:
        session, policy = start(folder, settings.resolution, f"preference.count={settings.prompts}")
        costs = measure(session, policy)
        costs.write(Path(settings.out))
        console.print(json.dumps(vars(costs), indent=1))
        table = Table(title="an iteration's pairs, seconds", title_justify="left", box=SIMPLE_HEAD)
        for column in ("workers", "measured", "predicted", "error"):
            table.add_column(column, justify="right")
        for row in check(session, policy, costs, settings.workers):
            figures = f"{row['seconds']:.1f}", f"{row['predicted']:.1f}", f"{row['error']:+.0%}"
            table.add_row(str(row["workers"]), *figures)
        ray.shutdown()
    print_table(table, console)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(MeasureSettings, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
