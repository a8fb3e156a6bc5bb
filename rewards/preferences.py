"""Preference builders: turn samples and winners into pairs of a chosen and a rejected image.

A builder is a callable ``(samples, winners, sample_rewards, winner_rewards) -> (pairs, dropped)``:

- ``samples``: images drawn by policies;
- ``winners``: the stronger system's images, by prompt id;
- ``sample_rewards``: one for each sample; None (or NaN) is not scored;
- ``winner_rewards``: by prompt id;
- ``dropped``: the number of samples that are in no pair, by reason.

Both rewards are None if no reward is configured. ``preference.options`` are a builder's keyword-only arguments. A
builder is called once without samples before a run starts, to find bad options; `check_books` verifies its counts.
"""

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Protocol

from rewards.total import Total
from vargpt_rl.data.samples import Prompt, Sample, Winner

HUMAN = "rewards.preferences:human"
"""The builder whose pairs people label before a run continues."""
OWN_SAMPLES = "rewards.preferences:best_of_n"
"""The builder that needs no winners."""
Built = tuple[list["PreferencePair"], Counter[str]]
RewardValue = float | None


class ReferenceScore(Protocol):
    """An image's log-probability in nats: the sum over its bits, and its parts by scale."""

    @property
    def total(self) -> float: ...

    @property
    def by_scale(self) -> list[float]: ...


@dataclass(frozen=True)
class PreferencePair:
    """Two images of one prompt. ``pair_id`` is the id of one of its samples (`pair_id`)."""

    pair_id: str
    chosen: Sample | Winner
    rejected: Sample | Winner
    chosen_reward: RewardValue
    rejected_reward: RewardValue

    @property
    def prompt(self) -> Prompt:
        return self.rejected.prompt

    @property
    def samples(self) -> list[Sample]:
        """The images drawn by a policy."""
        return [side for side in (self.chosen, self.rejected) if isinstance(side, Sample)]

    def row(self, chosen: ReferenceScore, rejected: ReferenceScore, reference_version: int) -> dict[str, object]:
        """The pair as a row of the preference table, with the reference policy's scores."""
        row = {
            "pair_id": self.pair_id,
            "prompt_id": self.prompt.id,
            "prompt": self.prompt.text,
            "reply": self.prompt.reply,
            "resolution": self.rejected.resolution,
            "sampling": json.dumps(self.samples[-1].sampling if self.samples else {}, sort_keys=True),
            "reference_version": reference_version,
        }
        sides = {
            "chosen": (self.chosen, self.chosen_reward, chosen),
            "rejected": (self.rejected, self.rejected_reward, rejected),
        }
        for name, (image, reward, score) in sides.items():
            sample = image if isinstance(image, Sample) else None
            row |= {
                f"{name}_bits": image.bits,
                f"{name}_source": image.checkpoint if isinstance(image, Sample) else image.source,
                f"{name}_seed": sample.seed if sample else None,
                f"{name}_version": sample.version if sample else None,
                f"{name}_reward": reward,
                f"reference_{name}_logp": score.total,
                f"reference_{name}_by_scale": score.by_scale,
            }
        return row


def pair_id(sample: Sample) -> str:
    """Id of a sample and of the pair made of it: 16 hex digits, the same in every run."""
    origin = json.dumps([sample.prompt.id, sample.resolution, sample.seed, sample.checkpoint])
    return hashlib.blake2b(origin.encode(), digest_size=8).hexdigest()


def check_books(samples: Sequence[Sample], pairs: Sequence[PreferencePair], dropped: Counter[str]) -> None:
    """RuntimeError unless pairs are unique and every sample is either in a pair or dropped."""
    names = Counter(pair.pair_id for pair in pairs)
    if repeated := [name for name, count in names.items() if count > 1]:
        raise RuntimeError(f"the preference builder made {len(repeated)} pairs twice, among them {repeated[0]}")
    paired = {pair_id(sample) for pair in pairs for sample in pair.samples}
    if strange := paired - {pair_id(sample) for sample in samples}:
        raise RuntimeError(f"the preference builder paired {len(strange)} samples that it was not given")
    if len(paired) + sum(dropped.values()) != len(samples):
        raise RuntimeError(
            f"the preference builder was given {len(samples)} samples; {len(paired)} are in pairs and "
            f"{sum(dropped.values())} are dropped ({dict(dropped)}): each must be in a pair or dropped, not both"
        )


def external_winner(
    samples: Sequence[Sample],
    winners: dict[str, Winner],
    sample_rewards: Sequence[RewardValue] | None,
    winner_rewards: dict[str, RewardValue] | None,
) -> Built:
    """Each sample is rejected for the stronger system's image of its prompt, whatever their rewards.

    ValueError if there are not as many rewards as samples, or only one side has rewards.
    """
    if (sample_rewards is None) != (winner_rewards is None):
        raise ValueError("expected rewards for both sides of the pairs or for neither, got one side")
    own = [None] * len(samples) if sample_rewards is None else sample_rewards
    pairs: dict[str, PreferencePair] = {}
    dropped: Counter[str] = Counter()
    for sample, value in zip(samples, own, strict=True):
        winner = winners.get(sample.prompt.id)
        rejected_reward = _scored(value)
        chosen_reward = None if winner_rewards is None else _scored(winner_rewards.get(sample.prompt.id))
        name = pair_id(sample)
        if winner is None:
            dropped["no winner"] += 1
        elif winner.resolution != sample.resolution:
            dropped["resolution mismatch"] += 1
        elif sample_rewards is not None and (chosen_reward is None or rejected_reward is None):
            dropped["reward not scored"] += 1
        elif winner.bits == sample.bits:
            dropped["identical bits"] += 1
        elif name in pairs:
            dropped["duplicate pair id"] += 1
        else:
            pairs[name] = PreferencePair(name, winner, sample, chosen_reward, rejected_reward)
    return list(pairs.values()), dropped


def reward_gated(
    samples: Sequence[Sample],
    winners: dict[str, Winner],
    sample_rewards: Sequence[RewardValue],
    winner_rewards: dict[str, RewardValue],
    *,
    margin: float = 0.0,
    flip: bool = False,
) -> Built:
    """The pairs of `external_winner` whose chosen image has a reward higher by more than ``margin``.

    A sample that is better than its winner by more than ``margin`` is dropped or, with ``flip``, chosen. SSPO
    (self-sampling preference optimisation) looks for such samples too, but by likelihood, and trains SFT on them.
    ValueError without rewards and for a negative margin.
    """
    _check(sample_rewards, "reward_gated", margin)
    if not isinstance(flip, bool):
        raise ValueError(f"flip={flip}: expected true or false")
    pairs, dropped = external_winner(samples, winners, sample_rewards, winner_rewards)
    kept = []
    for pair in pairs:
        # With rewards, external_winner drops pairs that lack one.
        assert pair.chosen_reward is not None and pair.rejected_reward is not None
        ahead = pair.chosen_reward - pair.rejected_reward
        if ahead > margin:
            kept.append(pair)
        elif ahead >= -margin:
            dropped["reward margin too small"] += 1
        elif flip:
            kept.append(
                PreferencePair(pair.pair_id, pair.rejected, pair.chosen, pair.rejected_reward, pair.chosen_reward)
            )
        else:
            dropped["sample better than winner"] += 1
    return kept, dropped


def majority_vote(
    samples: Sequence[Sample],
    winners: dict[str, Winner],
    sample_rewards: Sequence[RewardValue],
    winner_rewards: dict[str, RewardValue],
) -> Built:
    """The pairs of `external_winner` whose chosen image is better by more rewards than it is worse by.

    Each term of `rewards.combined.WeightedSum` that both sides have has one vote, whatever its weight. ValueError
    for rewards of another kind.
    """
    _check(sample_rewards, "majority_vote")
    pairs, dropped = external_winner(samples, winners, sample_rewards, winner_rewards)
    kept = []
    for pair in pairs:
        if not isinstance(pair.chosen_reward, Total) or not isinstance(pair.rejected_reward, Total):
            raise ValueError("majority_vote needs several rewards: set reward.path=rewards.combined:WeightedSum")
        chosen, rejected = pair.chosen_reward.terms, pair.rejected_reward.terms
        votes = [(chosen[name] > rejected[name]) - (chosen[name] < rejected[name]) for name in chosen.keys() & rejected]
        if sum(votes) > 0:
            kept.append(pair)
        else:
            dropped["vote lost" if sum(votes) < 0 else "vote tied"] += 1
    return kept, dropped


def best_of_n(
    samples: Sequence[Sample],
    winners: dict[str, Winner],
    sample_rewards: Sequence[RewardValue],
    winner_rewards: dict[str, RewardValue],
    *,
    margin: float = 0.0,
) -> Built:
    """Among the samples of a prompt and resolution, choose the highest reward and reject the lowest.

    Their rewards must differ by more than ``margin``. The stronger system's images are not used. ValueError without
    rewards and for a negative margin.
    """
    _check(sample_rewards, "best_of_n", margin)
    groups: dict[tuple[str, int], list[tuple[float, Sample]]] = defaultdict(list)
    seen: set[str] = set()
    pairs, dropped = [], Counter()
    for sample, value in zip(samples, sample_rewards, strict=True):
        if pair_id(sample) in seen:
            dropped["duplicate pair id"] += 1
        elif (reward := _scored(value)) is None:
            dropped["reward not scored"] += 1
        else:
            groups[sample.prompt.id, sample.resolution].append((reward, sample))
        seen.add(pair_id(sample))
    for group in groups.values():
        (most, best), (least, worst) = (extreme(group, key=itemgetter(0)) for extreme in (max, min))
        if len(group) == 1:
            dropped["only sample of its prompt"] += 1
        elif most - least <= margin:
            dropped["reward margin too small"] += len(group)
        elif best.bits == worst.bits:
            dropped["identical bits"] += len(group)
        else:
            pairs.append(PreferencePair(pair_id(worst), best, worst, most, least))
            dropped["between best and worst"] += len(group) - 2
    return pairs, +dropped


def mixed(
    samples: Sequence[Sample],
    winners: dict[str, Winner],
    sample_rewards: Sequence[RewardValue],
    winner_rewards: dict[str, RewardValue],
    *,
    external: float = 0.5,
    margin: float = 0.0,
) -> Built:
    """Pairs of `external_winner`, a share ``external`` of all, and of `best_of_n` with ``margin``.

    The samples of a prompt go to one of the two. Pairs in excess of their share, if the other kind has too few, are
    dropped. ValueError without rewards, for a negative margin and for a share outside 0 to 1.
    """
    _check(sample_rewards, "mixed", margin)
    if not 0 <= external <= 1:
        raise ValueError(f"external={external}: expected a share from 0 to 1")
    prompts: dict[str, list[tuple[Sample, RewardValue]]] = defaultdict(list)
    for sample, value in zip(samples, sample_rewards, strict=True):
        prompts[sample.prompt.id].append((sample, value))
    from_winners, from_samples, dropped = [], [], Counter()
    for group in prompts.values():
        drawn, values = zip(*group, strict=True)
        lost, why_lost = external_winner(drawn, winners, values, winner_rewards)
        ranked, why_ranked = best_of_n(drawn, winners, values, winner_rewards, margin=margin)
        behind = len(from_winners) < external * (len(from_winners) + len(from_samples) + 1)
        if lost and (behind or not ranked):
            from_winners += lost
            dropped += why_lost
        else:
            from_samples += ranked
            dropped += why_ranked
    outer, inner = len(from_winners), len(from_samples)
    if external < 1:
        outer = round(min(outer, inner * external / (1 - external)))
    if external > 0:
        inner = round(min(inner, len(from_winners) * (1 - external) / external))
    surplus = from_winners[outer:] + from_samples[inner:]
    dropped["over its share"] += sum(len(pair.samples) for pair in surplus)
    return from_winners[:outer] + from_samples[:inner], +dropped


def human(
    samples: Sequence[Sample],
    winners: dict[str, Winner],
    sample_rewards: Sequence[RewardValue] | None,
    winner_rewards: dict[str, RewardValue] | None,
    *,
    against: str = "samples",
    share: float = 1.0,
) -> Built:
    """Pairs for people to label: two samples of a prompt each, or, ``against`` "winners", those of `external_winner`.

    Which image is called chosen means nothing until people have said so. The run waits until a ``share`` of the pairs
    has an answer, and pairs without a winner are dropped. ValueError for another ``against``, and for a share that
    is not above 0 and at most 1.
    """
    if against not in ("samples", "winners"):
        raise ValueError(f"against={against}: expected samples or winners")
    if isinstance(share, bool) or not 0 < share <= 1:
        raise ValueError(f"share={share}: expected a share above 0, at most 1")
    if against == "winners":
        return external_winner(samples, winners, sample_rewards, winner_rewards)
    own = [None] * len(samples) if sample_rewards is None else [_scored(value) for value in sample_rewards]
    groups: dict[tuple[str, int], dict[str, tuple[Sample, RewardValue]]] = defaultdict(dict)
    dropped: Counter[str] = Counter()
    for sample, value in zip(samples, own, strict=True):
        group = groups[sample.prompt.id, sample.resolution]
        if pair_id(sample) in group:
            dropped["duplicate pair id"] += 1
        else:
            group[pair_id(sample)] = (sample, value)
    pairs = []
    for group in groups.values():
        each = list(group.values())
        for (first, one), (second, other) in zip(each[::2], each[1::2], strict=False):
            if first.bits == second.bits:
                dropped["identical bits"] += 2
            else:
                pairs.append(PreferencePair(pair_id(second), first, second, one, other))
        dropped["without a partner"] += len(each) % 2
    return pairs, +dropped


def _check(rewards: Sequence[RewardValue] | None, name: str, margin: float = 0.0) -> None:
    if rewards is None:
        raise ValueError(f"{name} needs a reward, but reward.path is not set")
    if not margin >= 0:
        raise ValueError(f"margin={margin}: expected 0 or more")


def _scored(value: RewardValue) -> RewardValue:
    return None if value is None or math.isnan(value) else value
