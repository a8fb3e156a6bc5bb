"""Preference builders: they turn samples and winners into pairs of a chosen and a rejected picture.

A builder is a callable ``(samples, winners, sample_rewards, winner_rewards) -> (pairs, dropped)``:

- ``samples``: what policies drew;
- ``winners``: the stronger system's picture by prompt id;
- ``sample_rewards``: one for each sample; None (or NaN) is not scored;
- ``winner_rewards``: by prompt id;
- ``dropped``: how many samples gave no pair, by reason.

Both rewards are None where no reward was asked for.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vargpt_rl.data.types import Prompt, Sample, Winner


class Score(Protocol):
    """A picture's log-probability in nats: the sum over its bits, and the parts of the scales."""

    total: float
    by_scale: list[float]


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt as packed bits, the better first, with where they come from."""

    pair_id: str
    prompt: Prompt
    resolution: int
    chosen: bytes
    rejected: bytes
    chosen_source: str
    rejected_source: str
    rejected_seed: int
    rejected_version: int
    sampling: dict[str, float] = field(hash=False)
    chosen_reward: float | None
    rejected_reward: float | None

    def row(self, chosen: Score, rejected: Score, reference_version: int) -> dict[str, object]:
        """The pair as a row of the preference table, with what the reference policy makes of its pictures."""
        return {
            "pair_id": self.pair_id,
            "prompt_id": self.prompt.id,
            "prompt": self.prompt.text,
            "reply": self.prompt.reply,
            "resolution": self.resolution,
            "chosen_bits": self.chosen,
            "rejected_bits": self.rejected,
            "chosen_source": self.chosen_source,
            "rejected_source": self.rejected_source,
            "rejected_seed": self.rejected_seed,
            "rejected_version": self.rejected_version,
            "sampling": json.dumps(self.sampling, sort_keys=True),
            "chosen_reward": self.chosen_reward,
            "rejected_reward": self.rejected_reward,
            "reference_chosen_logp": chosen.total,
            "reference_rejected_logp": rejected.total,
            "reference_chosen_by_scale": chosen.by_scale,
            "reference_rejected_by_scale": rejected.by_scale,
            "reference_version": reference_version,
        }


def pair_id(sample: Sample) -> str:
    """Names the pair whose rejected picture is ``sample``: 16 hex digits, the same in every run."""
    origin = json.dumps([sample.prompt.id, sample.resolution, sample.seed, sample.checkpoint])
    return hashlib.blake2b(origin.encode(), digest_size=8).hexdigest()


def external_winner(
    samples: Sequence[Sample],
    winners: dict[str, Winner],
    sample_rewards: Sequence[float | None] | None,
    winner_rewards: dict[str, float | None] | None,
) -> tuple[list[Pair], Counter[str]]:
    """Each sample loses to the stronger system's picture of its prompt, whatever the rewards say.

    Raises ValueError where the number of rewards is not that of the samples, or only one side has rewards.
    """
    if (sample_rewards is None) != (winner_rewards is None):
        raise ValueError("rewards are given for one side of the pairs only")
    asked = sample_rewards is not None
    pairs: dict[str, Pair] = {}
    dropped: Counter[str] = Counter()
    for sample, value in zip(samples, sample_rewards if asked else [None] * len(samples), strict=True):
        winner = winners.get(sample.prompt.id)
        rejected_reward = _scored(value)
        chosen_reward = _scored(winner_rewards.get(sample.prompt.id)) if asked else None
        name = pair_id(sample)
        if winner is None:
            dropped["no winner"] += 1
        elif winner.resolution != sample.resolution:
            dropped["resolution mismatch"] += 1
        elif asked and (chosen_reward is None or rejected_reward is None):
            dropped["reward not scored"] += 1
        elif winner.bits == sample.bits:
            dropped["identical bits"] += 1
        elif name in pairs:
            dropped["duplicate pair id"] += 1
        else:
            pairs[name] = _pair(sample, winner, chosen_reward, rejected_reward)
    return list(pairs.values()), dropped


def reward_gated(
    samples: Sequence[Sample],
    winners: dict[str, Winner],
    sample_rewards: Sequence[float | None],
    winner_rewards: dict[str, float | None],
) -> tuple[list[Pair], Counter[str]]:
    """The pairs of `external_winner` whose winner has the higher reward. Raises ValueError without rewards."""
    if sample_rewards is None:
        raise ValueError("reward_gated needs a reward, but none is configured")
    pairs, dropped = external_winner(samples, winners, sample_rewards, winner_rewards)
    better = [pair for pair in pairs if pair.chosen_reward > pair.rejected_reward]
    return better, dropped + Counter({"winner not better": len(pairs) - len(better)})


def majority_vote(
    samples: Sequence[Sample],
    winners: dict[str, Winner],
    sample_rewards: Sequence[float | None],
    winner_rewards: dict[str, float | None],
) -> tuple[list[Pair], Counter[str]]:
    """The pairs of `external_winner` whose winner is better by more rewards than it is worse by.

    Each term of `rewards.combined.WeightedSum` that both sides have has one vote, whatever its weight. Raises
    ValueError where the rewards are not of that kind.
    """
    if sample_rewards is None:
        raise ValueError("majority_vote needs several rewards, but none is configured")
    pairs, dropped = external_winner(samples, winners, sample_rewards, winner_rewards)
    kept = []
    for pair in pairs:
        chosen, rejected = (getattr(reward, "terms", None) for reward in (pair.chosen_reward, pair.rejected_reward))
        if chosen is None or rejected is None:
            raise ValueError("majority_vote needs several rewards: set reward.path=rewards.combined:WeightedSum")
        votes = [(chosen[name] > rejected[name]) - (chosen[name] < rejected[name]) for name in chosen.keys() & rejected]
        if sum(votes) > 0:
            kept.append(pair)
        else:
            dropped["vote lost" if sum(votes) < 0 else "vote tied"] += 1
    return kept, dropped


def best_of_n(
    samples: Sequence[Sample],
    winners: dict[str, Winner],
    sample_rewards: Sequence[float | None],
    winner_rewards: dict[str, float | None],
) -> tuple[list[Pair], Counter[str]]:
    """Each sample loses to the best sample of its prompt and resolution, if that has a higher reward.

    The stronger system's pictures are not used. Raises ValueError without rewards.
    """
    if sample_rewards is None:
        raise ValueError("best_of_n needs a reward, but none is configured")
    scores = [_scored(value) for value in sample_rewards]
    best: dict[tuple[str, int], tuple[float, Sample]] = {}
    for sample, score in zip(samples, scores, strict=True):
        group = sample.prompt.id, sample.resolution
        if score is not None and (group not in best or score > best[group][0]):
            best[group] = score, sample
    pairs: dict[str, Pair] = {}
    dropped: Counter[str] = Counter()
    for sample, score in zip(samples, scores, strict=True):
        if score is None:
            dropped["reward not scored"] += 1
            continue
        most, chosen = best[sample.prompt.id, sample.resolution]
        if score == most:
            dropped["none better"] += 1
        elif chosen.bits == sample.bits:
            dropped["identical bits"] += 1
        elif pair_id(sample) in pairs:
            dropped["duplicate pair id"] += 1
        else:
            winner = Winner(chosen.prompt, chosen.bits, chosen.resolution, source=chosen.checkpoint)
            pairs[pair_id(sample)] = _pair(sample, winner, most, score)
    return list(pairs.values()), dropped


def _pair(sample: Sample, winner: Winner, chosen_reward: float | None, rejected_reward: float | None) -> Pair:
    return Pair(
        pair_id=pair_id(sample),
        prompt=sample.prompt,
        resolution=sample.resolution,
        chosen=winner.bits,
        rejected=sample.bits,
        chosen_source=winner.source,
        rejected_source=sample.checkpoint,
        rejected_seed=sample.seed,
        rejected_version=sample.version,
        sampling=sample.sampling,
        chosen_reward=chosen_reward,
        rejected_reward=rejected_reward,
    )


def _scored(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value
