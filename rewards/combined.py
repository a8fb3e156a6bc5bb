"""Several rewards in one: a weighted sum that keeps its terms, each computed in its own process.

    reward:
      path: rewards.combined:WeightedSum
      options:
        terms:
          text: {path: "rewards.ocr:TextAccuracy", weight: 2, required: false}
          sharp: {path: "rewards.technical:sharpness"}

The keys of a term are the fields of `rewards.processes.RewardTerm`. `scorers` starts and ends the processes, also for a
single reward of any other kind.
"""

import json
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from PIL import Image
from ray.exceptions import GetTimeoutError, RayActorError

from rewards import Reward
from rewards.images import to_png
from rewards.processes import START_S, RewardServer, RewardStats, RewardTerm
from rewards.total import Total
from vargpt_rl.common.errors import first_line
from vargpt_rl.common.plugins import check_callable, load_plugin, make_plugin
from vargpt_rl.common.settings import parse

CHECK = """
import json, sys
import rewards.processes
from vargpt_rl.common.plugins import check_callable, load_plugin
check_callable(load_plugin(sys.argv[1]), json.loads(sys.argv[2]))
"""
"""Program that checks a reward's path and options (its arguments) without importing the reward's module here."""

ANSWER_S = 60.0
"""Seconds in which the server of rewards must answer. It computes nothing itself, so more means that it hangs."""


class RewardsLostError(Exception):
    """The server of rewards died or hangs."""


def weighted_sum(values: dict[str, float | None], terms: dict[str, RewardTerm]) -> Total | None:
    """The sum of weight x value for one image; None if a required term, or every term, has no value.

    If an optional term is missing, the sum of the others is scaled up to the weight of all: optional terms should be of
    the same magnitude as the others.
    """
    scored = {name: value for name, value in values.items() if value is not None}
    if not scored or any(term.required and name not in scored for name, term in terms.items()):
        return None
    share = sum(abs(terms[name].weight) for name in scored) / sum(abs(term.weight) for term in terms.values())
    return Total(sum(terms[name].weight * value for name, value in scored.items()) / share, scored)


class WeightedSum:
    """A reward made of others. ValueError, naming the term, for a bad term.

    A direct call starts and ends the processes of its rewards; `scorers` keeps them running.
    """

    def __init__(self, terms: dict[str, dict[str, object]]):
        if not terms:
            raise ValueError("reward.options.terms is empty: expected at least one reward, or no reward.path")
        self.terms = {name: _term(name, fields) for name, fields in terms.items()}
        self.makes = {name: partial(make_plugin, term.path, term.options) for name, term in self.terms.items()}

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Total | None]:
        with scorers(self) as running:
            return running(images, prompts)


@dataclass(frozen=True)
class Running:
    """Rewards whose processes are running: itself a reward, which any process of the same Ray cluster can call."""

    terms: dict[str, RewardTerm]
    server: ray.actor.ActorHandle
    before: dict[str, RewardStats]
    """Statistics when this use began."""

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Total | None]:
        pngs = ray.put([to_png(image) for image, _ in zip(images, prompts, strict=True)])
        scoring = self.server.score.remote([pngs], list(prompts))
        while not ray.wait([scoring], timeout=ANSWER_S)[0]:
            _answer(self.server.stats)  # each reward has a time limit of its own
        values = _result(scoring)
        rows = (dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True))
        return [weighted_sum(row, self.terms) for row in rows]

    def report(self) -> dict[str, dict[str, Any]]:
        """Statistics of this use, by term: scored images, their mean, unscored ones by reason, seconds, restarts."""
        stats = _answer(self.server.stats)
        return {name: stats[name].report(before) for name, before in self.before.items()}

    def renewed(self) -> "Running":
        """Return the same rewards, whose report begins now."""
        return replace(self, before=_answer(self.server.stats))


def _answer(method: ray.actor.ActorMethod) -> dict[str, RewardStats]:
    return _result(method.remote(), ANSWER_S)


def _result(reference: ray.ObjectRef, timeout_s: float | None = None) -> dict:
    """Return the result of a call of the server. RewardsLostError if it is dead, or says nothing in time."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except GetTimeoutError as error:
        raise RewardsLostError(f"the server of rewards did not answer in {timeout_s:g} s") from error
    except RayActorError as error:
        raise RewardsLostError("the server of rewards died") from error


def merge_reports(reports: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return the report of several uses of the same rewards, one after the other."""
    merged: dict[str, dict[str, Any]] = {}
    for name in reports[0] if reports else ():
        found = [report[name] for report in reports]
        scored = sum(each["scored"] for each in found)
        total = sum(each["scored"] * (each["mean"] or 0.0) for each in found)
        errors: dict[str, str] = {}
        unscored: Counter[str] = Counter()
        for each in found:
            errors = each["errors"] | errors
            unscored.update(each["unscored"])
        merged[name] = {
            "scored": scored,
            "mean": (found[0]["mean"] if len(found) == 1 else total / scored) if scored else None,
            "seconds": sum(each["seconds"] for each in found),
            "restarts": sum(each["restarts"] for each in found),
            "unscored": dict(unscored),
            "errors": errors,
        }
    return merged


class KeptRewards:
    """Rewards whose processes are kept between uses, until the driver ends: loading one takes seconds to minutes."""

    def __init__(self) -> None:
        self.running: dict[int, tuple[Reward, Running]] = {}

    def use(self, reward: Reward) -> Running:
        """Return ``reward`` with its processes running, started at the first use, or again if they are lost."""
        if known := self.running.get(id(reward)):
            live = known[1]
            try:
                live = replace(live, before=_answer(live.server.begin))
            except RewardsLostError:
                ray.kill(live.server)
                live = start(reward)
        else:
            live = start(reward)
        self.running[id(reward)] = reward, live
        return live


@contextmanager
def scorers(reward: Reward | Running) -> Iterator[Running]:
    """Run the rewards of a `WeightedSum` in separate processes; any other reward is a single required term.

    Rewards that are already running are left running.
    """
    if isinstance(reward, Running):
        yield reward
        return
    live = start(reward)
    try:
        yield live
    finally:
        ray.kill(live.server)  # the processes end with it


def start(reward: Reward) -> Running:
    """Start the server of a reward's processes, which start when images come."""
    if isinstance(reward, WeightedSum):
        terms, makes = reward.terms, reward.makes
    else:
        terms, makes = {"reward": RewardTerm("")}, {"reward": partial(_same, reward)}
    server = RewardServer.remote(  # type: ignore[attr-defined]  # ray.remote adds it
        terms, {name: [ray.put(make)] for name, make in makes.items()}
    )
    return Running(terms, server, _result(server.stats.remote(), START_S))


def _same(reward: Reward) -> Reward:
    return reward


def _term(name: str, fields: dict[str, object]) -> RewardTerm:
    """Check and build a term. ValueError for an unknown or bad key, or a missing or unsuitable plug-in."""
    term = parse(RewardTerm, fields, f"reward.options.terms.{name}")
    try:
        where, colon, attribute = term.path.rpartition(":")
        if where.endswith(".py"):  # processes may run in other folders
            term.path = f"{Path(where).resolve()}{colon}{attribute}"
        if term.python:
            _check_elsewhere(term, term.python)
        else:
            check_callable(load_plugin(term.path), term.options)
    except (ImportError, ValueError) as error:
        raise ValueError(f"reward.options.terms.{name}: {first_line(error)}") from error
    return term


def _check_elsewhere(term: RewardTerm, python: str) -> None:
    """Check the plug-in in the environment of the interpreter ``python``, the only one where its imports work."""
    if not Path(python).is_file():
        raise ValueError(f"python={python}: there is no such file")
    command = [python, "-c", CHECK, term.path, json.dumps(term.options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ValueError(f"{python}: {said[-1]}")
