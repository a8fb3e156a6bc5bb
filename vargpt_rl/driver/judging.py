"""Judging: score images with the reward plug-ins, which run in processes of their own beside the workers."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from actors.worker import PromptedBits, Worker
from rewards.combined import RewardsLostError, Running, merge_reports, scorers
from rewards.total import Total
from vargpt_rl.data.rollouts import Rollouts, read_rollouts
from vargpt_rl.driver.parts import in_parts
from vargpt_rl.driver.sampling import SAMPLES
from vargpt_rl.driver.session import StageContext
from vargpt_rl.storage.files import write_atomically

REWARDS = "rewards.json"
"""File of an iteration's rewards in `StageContext.rollouts`."""


@dataclass(frozen=True)
class Rewards:
    """Rewards of `Rollouts`: one per sample, and those of winners by prompt id; both None without a reward."""

    samples: list[float | None] | None
    winners: dict[str, float | None] | None


NO_REWARDS = Rewards(None, None)


def judge(context: StageContext) -> dict:
    """Score an iteration's samples and winners with the reward, if there is one; return what became of them by term."""
    if context.inputs.reward is None:
        return {}
    rollouts = read_rollouts(context.rollouts / SAMPLES)
    values, report = score(context, rollouts.images, context.inputs.reward, "samples")
    write_rewards(context.rollouts / REWARDS, values)
    return report


@contextmanager
def running(context: StageContext, reward: Callable) -> Iterator[Running]:
    """Have a reward's processes run in the context; those of the run's own rewards are kept after it."""
    if any(reward is own for own in (context.inputs.reward, context.inputs.judge)):
        yield context.session.rewards.use(reward)
        return
    with scorers(reward) as live:
        yield live


def judge_rollouts(
    context: StageContext, rollouts: Rollouts, reward: Callable | None, keep: str
) -> tuple[Rewards, dict]:
    """Score samples and winners; return the rewards and the report of `score`."""
    if reward is None:
        return NO_REWARDS, {}
    values, report = score(context, rollouts.images, reward, keep)
    return split_rewards(rollouts, values), report


def split_rewards(rollouts: Rollouts, values: list[float | None]) -> Rewards:
    """Assign the rewards of `Rollouts.images`, in order, to samples and winners."""
    count = len(rollouts.samples)
    return Rewards(values[:count], dict(zip(rollouts.winners, values[count:], strict=True)))


def score(
    context: StageContext, items: list[PromptedBits], reward: Callable, keep: str = ""
) -> tuple[list[float | None], dict]:
    """Score images with ``reward``; return a value each and the report by term, which is logged.

    With ``keep``, finished parts are kept under a name that ends in it. A lost server of rewards is started again,
    once. ValueError if no image at all is scored.
    """
    try:
        parts = _score_in_parts(context, items, reward, keep)
    except RewardsLostError as lost:
        context.run.note(f"{lost}: restarted", restart=True)
        parts = _score_in_parts(context, items, reward, keep)
    values = [value for part in parts for value in rewards_of(part["rewards"])]
    report = merge_reports([part["report"] for part in parts])
    for name, term in report.items():
        unscored = {f"unscored/{reason}": count for reason, count in term["unscored"].items()}
        numbers = {key: term[key] for key in ("scored", "mean", "seconds", "restarts") if term[key] is not None}
        context.log(f"reward/{name}", context.pool.version, numbers | unscored)
    if all(value is None for value in values):
        why = {name: term["errors"] or term["unscored"] for name, term in report.items()}
        raise ValueError(f"none of {len(values)} images was scored by the reward; see reward.path: {why}")
    return values, report


def _score_in_parts(context: StageContext, items: list[PromptedBits], reward: Callable, keep: str) -> list[dict]:
    """Return rewards and report of each part, from disk if it was done before."""
    with running(context, reward) as live:

        def judge_part(part: list[PromptedBits]) -> dict:
            counted = live.renewed()
            found = context.pool.run(Worker.reward, part, context.resolution, counted)
            return {"rewards": reward_rows(found), "report": counted.report()}

        return list(in_parts(context, f"rewards-{keep}", items, judge_part) if keep else [judge_part(items)])


def write_rewards(path: Path, values: Sequence[float | None]) -> None:
    """Write rewards in order as JSON; a sum of rewards keeps its terms."""
    write_atomically(path, json.dumps(reward_rows(values)).encode())


def reward_rows(values: Sequence[float | None]) -> list[list]:
    """Return rewards as JSON; a sum of rewards keeps its terms."""
    return [[value, value.terms if isinstance(value, Total) else None] for value in values]


def rewards_of(rows: list[list]) -> list[float | None]:
    """Return the rewards of `reward_rows`."""
    return [value if terms is None else Total(value, terms) for value, terms in rows]


def read_rewards(path: Path, rollouts: Rollouts) -> Rewards:
    """Read the rewards of ``rollouts``. ValueError naming the file if it is damaged or of other rollouts."""
    try:
        return split_rewards(rollouts, rewards_of(json.loads(path.read_bytes())))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not the rewards of {len(rollouts.images)} images: {error}") from error
