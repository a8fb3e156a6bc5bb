"""Agreement of automatic rewards with people: how often a reward prefers the image of a pair that people prefer."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from actors.worker import PromptedBits
from rewards.preferences import PreferencePair
from rewards.total import Total
from vargpt_rl.common.averages import wilson
from vargpt_rl.driver.judging import score
from vargpt_rl.driver.session import StageContext
from vargpt_rl.page.labels import wins
from vargpt_rl.storage.files import write_atomically
from vargpt_rl.storage.images import margins_path

REWARD, JUDGE = "reward", "judge"
Margins = dict[str, list[float | None]]
"""Reward of the chosen image less that of the rejected one, for each pair, by the reward's name; None is unscored."""


@dataclass(frozen=True)
class ScoredSides:
    """Pairs with the training reward of both sides, if there is one, and the margins of everything that scores them."""

    pairs: list[PreferencePair]
    margins: Margins


def score_sides(context: StageContext, pairs: Sequence[PreferencePair]) -> ScoredSides:
    """Score both sides of pairs by the training reward, as far as there is one, and by the judge; each image once."""
    margins: Margins = {}
    scored = list(pairs)
    if context.inputs.reward:
        values = _values(context, pairs, context.inputs.reward)
        scored = [replace(pair, chosen_reward=c, rejected_reward=r) for pair, (c, r) in zip(pairs, values, strict=True)]
        margins |= margins_of(values)
    return ScoredSides(scored, margins | judge_margins(context, pairs))


def judge_margins(context: StageContext, pairs: Sequence[PreferencePair]) -> Margins:
    """Return the margins of the judge, if there is one."""
    if not context.inputs.judge:
        return {}
    return {JUDGE: [_margin(*each) for each in _values(context, pairs, context.inputs.judge)]}


def _values(
    context: StageContext, pairs: Sequence[PreferencePair], reward: Callable
) -> list[tuple[float | None, float | None]]:
    sides: list[list[PromptedBits]] = [[(p.prompt, p.chosen.bits), (p.prompt, p.rejected.bits)] for p in pairs]
    images = list(dict.fromkeys(image for each in sides for image in each))
    known = dict(zip(images, score(context, images, reward)[0], strict=True))
    return [(known[chosen], known[rejected]) for chosen, rejected in sides]


def margins_of(values: Sequence[tuple[float | None, float | None]]) -> Margins:
    """Return the margins of a reward, and of its terms if it is a sum of several."""
    found: Margins = {REWARD: [_margin(*each) for each in values]}
    names = dict.fromkeys(name for each in values for side in each if isinstance(side, Total) for name in side.terms)
    for name in names:
        terms = [tuple(side.terms.get(name) if isinstance(side, Total) else None for side in each) for each in values]
        found[name] = [_margin(chosen, rejected) for chosen, rejected in terms]
    return found


def write_margins(table: Path, pairs: Sequence[PreferencePair], judged: Margins) -> None:
    """Write the margins of the pairs of a preference table beside it: those of their rewards, and ``judged``."""
    margins = margins_of([(pair.chosen_reward, pair.rejected_reward) for pair in pairs]) | judged
    by_pair = {
        name: {pair.pair_id: value for pair, value in zip(pairs, values, strict=True)}
        for name, values in margins.items()
    }
    write_atomically(margins_path(table), json.dumps(by_pair).encode())


def join_margins(table: Path, parts: Sequence[Path]) -> None:
    """Write the margins of a table that was made in parts."""
    margins: dict[str, dict[str, float | None]] = {}
    for part in parts:
        for name, by_pair in json.loads(margins_path(part).read_bytes()).items():
            margins.setdefault(name, {}).update(by_pair)
    write_atomically(margins_path(table), json.dumps(margins).encode())


def _margin(chosen: float | None, rejected: float | None) -> float | None:
    return None if chosen is None or rejected is None else float(chosen) - float(rejected)


def agreements(margins: Mapping[str, Sequence[float | None]]) -> dict[str, dict[str, float]]:
    """Return for each reward how often it prefers the chosen image, with a 95 % interval (Wilson); ties count half.

    Rewards that score no pair are left out.
    """
    found = {}
    for name, values in margins.items():
        known = [value for value in values if value is not None]
        if known:
            right = wins(known)
            low, high = wilson(right, len(known))
            found[name] = {"right": right, "n": len(known), "low": low, "high": high}
    return found
