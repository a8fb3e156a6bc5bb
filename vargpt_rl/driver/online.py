"""Online RL on image tokens: draw a group of images of each prompt, judge them, learn from them, swap, repeat.

The learner stays up: it takes a batch per file that appears in a folder, and saves its weights after each. What a
method learns from a group, and its loss: `learners.methods`. Drawing and judging: `vargpt_rl.driver.groups`. What stops
training, or takes it back: `vargpt_rl.driver.guard`.
"""

import json
import math
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from actors.worker import ImageScore, Worker
from learners.config import Recipe
from learners.group import RunningJob
from learners.jobs import PolicyGradientJob
from learners.methods import ONLINE
from vargpt_rl.data.policy_batches import batch_path, write_policy_batch
from vargpt_rl.driver.evaluation import validate
from vargpt_rl.driver.groups import (
    DrawnBatch,
    Judges,
    NothingToLearnError,
    draw_batch,
    judges,
    measure_diversity,
    needs_reference,
    rows_of,
)
from vargpt_rl.driver.guard import Guard
from vargpt_rl.driver.session import StageContext
from vargpt_rl.driver.training import follow, random_probe
from vargpt_rl.storage.checkpoint import Policy
from vargpt_rl.storage.files import write_atomically

LOOK_S = 0.5
"""Longest wait, in seconds, between two looks at the learner."""


@dataclass(frozen=True)
class OnlineRun:
    """An online method under way, from ``start``, which is also the reference."""

    context: StageContext
    method: str
    start: Policy
    guard: Guard
    training: RunningJob

    @property
    def output(self) -> Path:
        """The folder of the weights that the learner saves."""
        return self.context.checkpoint(self.method)


def batches_of(context: StageContext, method: str) -> Path:
    """Return the folder of a method's batches. Kept until its result is recorded, since a resumed job repeats steps."""
    return context.run.directory.resolve() / "rollouts" / f"{context.name}-{method}"


def states_of(context: StageContext, method: str) -> Path | None:
    """Return the folder of the language model's states of a method's images; None if they are not stored."""
    if not context.config.rl.stored_states:
        return None
    return context.run.directory.resolve() / "states" / f"{context.name}-{method}"


def forget_batches(context: StageContext, method: str) -> None:
    """Delete the batches of a method that is recorded, and the states of their images."""
    shutil.rmtree(batches_of(context, method), ignore_errors=True)
    if (states := states_of(context, method)) is not None:
        shutil.rmtree(states, ignore_errors=True)


def train_online(context: StageContext, policy: Policy, method: str) -> dict:
    """Train an online method from ``policy``; return the learner's result with the first and last figures."""
    settings = context.config.rl
    recipe = recipe_for(context, method)
    folder = batches_of(context, method)
    folder.mkdir(parents=True, exist_ok=True)
    probe = random_probe(context)
    states = states_of(context, method)
    if states is not None:
        context.swap_to(policy)
        context.pool.run(Worker.score, [(probe.prompt, probe.bits)], context.resolution, 1.0, states)
    job = PolicyGradientJob(
        start=policy,
        batches=folder,
        recipe=recipe,
        rl=settings,
        output=context.checkpoint(method),
        seed=context.config.seed + context.index,
        probe=probe,
        method=method,
        states=states,
    )
    guard = Guard(settings.guard, folder, job.output, context.run.note)
    training = context.session.learners.start(
        job, _watched(guard, follow(context, method, recipe, context.config.learner.ranks))
    )
    run = OnlineRun(context, method, policy, guard, training)
    with judges(context) as live:
        for number in range(math.ceil(recipe.steps / settings.updates)):
            if not batch_path(folder, number).exists():  # else drawn before an interruption
                _write_batch(run, live, number)
            if guard.stopped is not None:
                break
    result = training.result()
    if states is not None:
        sizes = [path.stat().st_size for path in states.glob("*.safetensors")]
        context.run.note(f"rl.stored_states: {len(sizes)} images in {states}, {sum(sizes) / 1e9:.3g} GB")
    return _finish(run, result) | _summarise(folder, result)


def recipe_for(context: StageContext, method: str) -> Recipe:
    """Return the recipe with a batch just large enough for the images that the method learns from."""
    settings = context.config.rl
    unit = settings.recipe.micro_batch * context.config.learner.ranks
    rows = settings.prompts * (ONLINE[method].compared(settings, settings.group) or settings.group)
    return replace(settings.recipe, batch=min(settings.recipe.batch, math.ceil(rows / unit) * unit))


def _watched(guard: Guard, show: Callable[[dict], None]) -> Callable[[dict], None]:
    """Return a callback that lets ``guard`` see the learner's log lines before ``show`` does."""

    def on_log(line: dict) -> None:
        guard.watch(line)
        show(line)

    return on_log


def _write_batch(run: OnlineRun, live: Judges, number: int) -> None:
    """Draw, judge and write one batch with the learner's weights, unless the guard stops the method before."""
    context = run.context
    settings = context.config.rl
    learned = max(0, number - settings.staleness) * settings.updates
    times = Timer()
    current = _wait_for(run, learned)
    times.take("wait")
    if current is None or run.guard.stopped is not None:
        return
    swapped = context.swap_to(current)
    times.take("swap")
    if run.guard.is_due(number) and learned not in run.guard.scores:
        run.guard.see_score(learned, validate(context, f"{run.method}/validate", learned))
    times.take("validate")
    try:
        batch = draw_batch(context, live, number, ONLINE[run.method])
    except NothingToLearnError as error:
        if number == 0:
            raise
        run.guard.stop(str(error))
        return
    times.begin()
    rows = rows_of(context, batch, ONLINE[run.method], learned, _score(run, batch))
    times.take("score")
    figures = _figures(context, batch) | {
        "version": swapped["version"],
        "staleness": number * settings.updates - learned,
    }
    run.guard.see_diversity(figures["diversity"])
    run.training.look()
    if run.guard.stopped is not None:  # the line of the last step was not there yet when its weights were
        return
    seconds = times.seconds | batch.seconds
    write_atomically(_figures_path(run.guard.folder, number), json.dumps(figures | {"seconds": seconds}).encode())
    write_policy_batch(batch_path(run.guard.folder, number), rows)
    context.log(
        f"{run.method}/rollout", number + 1, figures | {f"time/{name}": value for name, value in seconds.items()}
    )


class Timer:
    """Wall time by part, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.begin()

    def begin(self) -> None:
        """Start the next part."""
        self.began = time.perf_counter()

    def take(self, part: str) -> None:
        """Add the time since the last part to this one."""
        self.seconds[part] += time.perf_counter() - self.began
        self.begin()


def _wait_for(run: OnlineRun, learned: int) -> Policy | None:
    """Return the policy after ``learned`` optimizer steps, once the learner has saved and logged it.

    None if the learner was stopped before. Weights from before the last batch are dropped. Those that it began with are
    kept: training goes back to them if one of its steps has diverged, however far the learner has gone meanwhile.
    """
    if not learned:
        return run.start
    weights = run.output / f"step-{learned:06d}"
    while run.training.wait(LOOK_S) and not weights.exists():
        pass
    if not weights.exists():
        if run.guard.stopped is not None:
            return None
        raise RuntimeError(f"the learner ended before step {learned}: {weights} is missing")
    run.guard.drop_weights(oldest=learned - run.context.config.rl.updates)
    return run.start.plus(weights)


def _score(run: OnlineRun, batch: DrawnBatch) -> list[ImageScore] | None:
    """Score images by the reference, which is then in the workers; None if the workers need not.

    The language model's states are stored in the same pass. They are those of any weights of the method, and in the
    micro-batches of the learner, so that these compute what they would with a language model.
    """
    context = run.context
    is_wanted = needs_reference(context, ONLINE[run.method])
    states = states_of(context, run.method)
    if is_wanted:
        context.swap_to(run.start)
    elif states is None:
        return None
    items = [(sample.prompt, sample.bits) for sample in batch.samples]
    size = context.config.rl.recipe.micro_batch
    scores = context.pool.run(
        Worker.score, items, context.resolution, context.config.sampling.tau, states, batch_size=size
    )
    return scores if is_wanted else None


def _figures(context: StageContext, batch: DrawnBatch) -> dict[str, float]:
    """Return what is known of a batch's images: reward, second judge, diversity, groups."""
    found = {"reward": float(np.mean(batch.all_rewards)), "reward_std": float(np.std(batch.all_rewards))}
    if batch.judged:
        found["judge"] = float(np.mean(batch.judged))
    found |= measure_diversity(context, batch.drawn)
    return found | {f"groups/{name}": count for name, count in batch.counts.items()}


def _figures_path(folder: Path, number: int) -> Path:
    return folder / f"figures-{number:05d}.json"


def _finish(run: OnlineRun, result: dict) -> dict:
    """Validate the last weights and go back to the best; return the learner's result with what became of it."""
    context = run.context
    guard = run.guard
    last = result["steps"]
    if guard.limits.validate_every is not None and guard.diverged is None and last not in guard.scores:
        context.swap_to(run.start.plus(run.output / f"step-{last:06d}"))  # ``final`` may yet be replaced
        guard.see_score(last, validate(context, f"{run.method}/validate", last))
    kept = guard.keep_wanted(last)
    found: dict = {"kept_step": kept}
    if guard.scores:
        found["validated"] = {str(step): score for step, score in sorted(guard.scores.items())}
    if guard.stopped is not None:
        found["stopped"] = guard.stopped
    # The learner scored the probe with its last weights.
    return {name: value for name, value in result.items() if name != "probe" or kept == last} | found


def _summarise(folder: Path, result: dict) -> dict:
    """Return first and last figures of a method's batches, counts of groups, and seconds of a batch by part."""
    figures = [json.loads(path.read_text()) for path in sorted(folder.glob("figures-*.json"))]
    found: dict = {}
    for name in ("reward", "judge", "diversity", "diversity/prompts"):
        if name in figures[0]:
            found |= {f"{name}_first": figures[0][name], f"{name}_last": figures[-1][name]}
    groups: Counter[str] = Counter()
    seconds: dict[str, float] = defaultdict(float, learn=result["seconds"] - result["waited"])
    for each in figures:
        groups.update({name.removeprefix("groups/"): n for name, n in each.items() if name.startswith("groups/")})
        for name, value in each["seconds"].items():
            seconds[name] += value
    per_batch = {name: value / len(figures) for name, value in seconds.items()}
    return found | {"groups": dict(groups), "seconds_per_batch": per_batch}
