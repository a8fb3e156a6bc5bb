import math
from types import SimpleNamespace

import pytest

from rewards.combined import Total
from rewards.preferences import best_of_n, external_winner, majority_vote, pair_id, reward_gated
from vargpt_rl.data.preferences import read_table, write_table
from vargpt_rl.data.types import Prompt, Sample, Winner


def sample(prompt: str, bits: bytes, seed: int = 0, resolution: int = 256) -> Sample:
    return Sample(Prompt(prompt, f"draw {prompt}", "Here."), bits, resolution, seed, {"cfg": 3.0}, 4, "step-10")


def winner(prompt: str, bits: bytes, resolution: int = 256) -> Winner:
    return Winner(Prompt(prompt, f"draw {prompt}", "Here."), bits, resolution, "shapes")


WINNERS = {"a": winner("a", b"A"), "b": winner("b", b"B")}


def test_each_sample_loses_to_its_winner(tmp_path):
    samples = [sample("a", b"x", 0), sample("a", b"y", 1), sample("b", b"x", 0)]
    pairs, dropped = external_winner(samples, WINNERS, [0.5, 1.0, 0.0], {"a": 0.75, "b": 1.0})
    assert not dropped
    assert [(p.chosen, p.rejected, p.chosen_reward, p.rejected_reward) for p in pairs] == [
        (b"A", b"x", 0.75, 0.5),
        (b"A", b"y", 0.75, 1.0),
        (b"B", b"x", 1.0, 0.0),
    ]
    scores = [SimpleNamespace(total=-3.0, by_scale=[-1.0, -2.0]), SimpleNamespace(total=-4.0, by_scale=[-4.0, 0.0])]
    write_table(tmp_path / "t.parquet", [pair.row(scores[0], scores[1], 7) for pair in pairs])
    first = read_table(tmp_path / "t.parquet").iloc[0]
    assert (first.prompt, first.reply, first.chosen_source) == ("draw a", "Here.", "shapes")
    assert (first.rejected_source, first.rejected_version, first.reference_version) == ("step-10", 4, 7)
    assert (first.reference_chosen_logp, first.reference_rejected_logp) == (-3.0, -4.0)
    assert list(first.reference_chosen_by_scale) == [-1.0, -2.0]
    assert list(first.reference_rejected_by_scale) == [-4.0, 0.0]
    assert first.sampling == '{"cfg": 3.0}'


def test_drops_are_counted_by_reason():
    samples = [
        sample("a", b"x"),
        sample("a", b"y"),  # same origin, hence the same id
        sample("c", b"x"),
        sample("a", b"A", 1),
        sample("a", b"x", 2, resolution=512),
        sample("a", b"x", 3),
        sample("a", b"x", 4),
        sample("b", b"x", 5),
    ]
    pairs, dropped = external_winner(samples, WINNERS, [1.0] * 5 + [None, math.nan, 1.0], {"a": 1.0, "b": None})
    assert [pair.rejected for pair in pairs] == [b"x"]
    assert dropped == {
        "duplicate pair id": 1,
        "no winner": 1,
        "identical bits": 1,
        "resolution mismatch": 1,
        "reward not scored": 3,
    }
    assert len(pairs) + dropped.total() == len(samples)


def test_without_a_reward_every_pair_is_kept():
    pairs, dropped = external_winner([sample("a", b"x")], WINNERS, None, None)
    assert pairs[0].chosen_reward is pairs[0].rejected_reward is None and not dropped
    assert external_winner([], {}, None, None) == ([], {})


def test_rewards_must_match_the_samples():
    with pytest.raises(ValueError):
        external_winner([sample("a", b"x")], WINNERS, [], {})
    with pytest.raises(ValueError, match="one side"):
        external_winner([sample("a", b"x")], WINNERS, None, {"a": 1.0})
    for builder in (reward_gated, best_of_n, majority_vote):
        with pytest.raises(ValueError, match=f"{builder.__name__} needs"):
            builder([sample("a", b"x")], WINNERS, None, None)


def test_pair_ids_are_stable_and_tell_origins_apart():
    assert pair_id(sample("a", b"x")) == pair_id(sample("a", b"y")) == "69a945c40a558dde"
    origins = [sample("a", b""), sample("b", b""), sample("a", b"", 1), sample("a", b"", 0, 512)]
    assert len({pair_id(origin) for origin in origins}) == 4


def test_the_gate_keeps_pairs_whose_winner_is_better():
    samples = [sample("a", b"x", 0), sample("a", b"y", 1), sample("a", b"z", 2), sample("c", b"x")]
    pairs, dropped = reward_gated(samples, WINNERS, [0.0, 1.0, 0.5, 0.0], {"a": 0.5})
    assert [pair.rejected for pair in pairs] == [b"x"]
    assert dropped == {"winner not better": 2, "no winner": 1}


def test_the_best_sample_beats_the_worse_of_its_prompt_and_resolution():
    samples = [
        sample("a", b"x", 0),
        sample("a", b"y", 1),
        sample("a", b"z", 2),
        sample("a", b"w", 3),
        sample("a", b"v", 0, resolution=512),
        sample("b", b"x", 0),
    ]
    pairs, dropped = best_of_n(samples, {}, [0.2, 0.9, 0.9, None, 0.1, 0.5], {})
    assert [(p.chosen, p.rejected, p.chosen_source, p.chosen_reward) for p in pairs] == [(b"y", b"x", "step-10", 0.9)]
    assert dropped == {"none better": 4, "reward not scored": 1}


def test_the_side_that_more_rewards_prefer_wins(tmp_path):
    def total(**terms: float) -> Total:
        return Total(sum(terms.values()), terms)

    samples = [sample("a", b"x", seed) for seed in range(5)]
    rewards = [
        total(clip=1.0, ocr=0.1, looks=90.0),  # loses 2 to 1, whatever the sum
        total(clip=3.0, ocr=0.1, looks=7.0),  # a tie: one each, and one equal
        total(clip=3.0, ocr=0.9, looks=1.0),  # wins
        total(clip=1.0),  # the others are not compared
        None,
    ]
    pairs, dropped = majority_vote(samples, WINNERS, rewards, {"a": total(clip=2.0, ocr=0.5, looks=7.0)})
    assert [pair.rejected_seed for pair in pairs] == [0, 3]
    assert dropped == {"vote tied": 1, "vote lost": 1, "reward not scored": 1}
    scores = [SimpleNamespace(total=-3.0, by_scale=[-3.0])] * 2
    write_table(tmp_path / "t.parquet", [pair.row(*scores, 7) for pair in pairs])
    assert list(read_table(tmp_path / "t.parquet").rejected_reward) == [91.1, 1.0]
    with pytest.raises(ValueError, match="reward.path=rewards.combined:WeightedSum"):
        majority_vote(samples[:1], WINNERS, [1.0], {"a": 2.0})
