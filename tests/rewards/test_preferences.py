import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.load import load_config
from rewards.preferences import (
    PreferencePair,
    best_of_n,
    check_books,
    external_winner,
    human,
    majority_vote,
    mixed,
    pair_id,
    reward_gated,
)
from rewards.total import Total
from vargpt_rl.data.preferences import read_table, write_table
from vargpt_rl.data.samples import Prompt, Sample, Winner
from vargpt_rl.driver.inputs import gather


def sample(prompt: str, bits: bytes, seed: int = 0, resolution: int = 256) -> Sample:
    return Sample(Prompt(prompt, f"draw {prompt}", "Here."), bits, resolution, seed, {"cfg": 3.0}, 4, "step-10")


def winner(prompt: str, bits: bytes, resolution: int = 256) -> Winner:
    return Winner(Prompt(prompt, f"draw {prompt}", "Here."), bits, resolution, "shapes")


WINNERS = {"a": winner("a", b"A"), "b": winner("b", b"B")}


def bits(pairs: list[PreferencePair]) -> list[tuple[bytes, bytes]]:
    return [(pair.chosen.bits, pair.rejected.bits) for pair in pairs]


def test_each_sample_loses_to_its_winner(tmp_path):
    samples = [sample("a", b"x", 0), sample("a", b"y", 1), sample("b", b"x", 0)]
    pairs, dropped = external_winner(samples, WINNERS, [0.5, 1.0, 0.0], {"a": 0.75, "b": 1.0})
    assert not dropped
    assert [(p.chosen.bits, p.rejected.bits, p.chosen_reward, p.rejected_reward) for p in pairs] == [
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
    assert bits(pairs) == [(b"A", b"x")]
    assert dropped == {
        "duplicate pair id": 1,
        "no winner": 1,
        "identical bits": 1,
        "resolution mismatch": 1,
        "reward not scored": 3,
    }
    check_books(samples, pairs, dropped)


def test_without_a_reward_every_pair_is_kept():
    pairs, dropped = external_winner([sample("a", b"x")], WINNERS, None, None)
    assert pairs[0].chosen_reward is pairs[0].rejected_reward is None and not dropped
    assert external_winner([], {}, None, None) == ([], {})


def test_rewards_must_match_the_samples():
    with pytest.raises(ValueError):
        external_winner([sample("a", b"x")], WINNERS, [], {})
    with pytest.raises(ValueError, match="one side"):
        external_winner([sample("a", b"x")], WINNERS, None, {"a": 1.0})
    for builder in (reward_gated, best_of_n, majority_vote, mixed):
        with pytest.raises(ValueError, match=f"{builder.__name__} needs"):
            builder([sample("a", b"x")], WINNERS, None, None)


def test_pair_ids_are_stable_and_tell_origins_apart():
    assert pair_id(sample("a", b"x")) == pair_id(sample("a", b"y")) == "69a945c40a558dde"
    origins = [sample("a", b""), sample("b", b""), sample("a", b"", 1), sample("a", b"", 0, 512)]
    assert len({pair_id(origin) for origin in origins}) == 4


def test_reward_gated_keeps_better_winners():
    samples = [sample("a", b"x", 0), sample("a", b"y", 1), sample("a", b"z", 2), sample("c", b"x")]
    pairs, dropped = reward_gated(samples, WINNERS, [0.0, 1.0, 0.5, 0.0], {"a": 0.5})
    assert bits(pairs) == [(b"A", b"x")]
    assert dropped == {"sample better than winner": 1, "reward margin too small": 1, "no winner": 1}


def test_reward_gated_margin_and_flip(tmp_path):
    samples = [sample("a", bytes([i]), i) for i in range(5)]
    rewards = [0.0, 0.25, 0.5, 0.75, 1.0]  # winner: 0.5, so ahead by 0.5, 0.25, 0, -0.25, -0.5
    pairs, dropped = reward_gated(samples, WINNERS, rewards, {"a": 0.5}, margin=0.25, flip=True)
    assert bits(pairs) == [(b"A", b"\0"), (b"\4", b"A")]
    assert [(p.chosen_reward, p.rejected_reward) for p in pairs] == [(0.5, 0.0), (1.0, 0.5)]
    assert dropped == {"reward margin too small": 3}
    check_books(samples, pairs, dropped)
    scores = [SimpleNamespace(total=-3.0, by_scale=[-3.0]), SimpleNamespace(total=-4.0, by_scale=[-4.0])]
    write_table(tmp_path / "t.parquet", [pair.row(*scores, 7) for pair in pairs])
    turned = read_table(tmp_path / "t.parquet").iloc[1]
    assert (turned.chosen_source, turned.chosen_seed, turned.chosen_version) == ("step-10", 4, 4)
    assert turned.rejected_source == "shapes" and turned[["rejected_seed", "rejected_version"]].isna().all()
    assert (turned.sampling, turned.reference_chosen_logp) == ('{"cfg": 3.0}', -3.0)
    assert turned.pair_id == pair_id(samples[4])


def test_best_of_n_pairs_best_and_worst():
    samples = [
        sample("a", b"x", 0),
        sample("a", b"y", 1),
        sample("a", b"z", 2),
        sample("a", b"w", 3),
        sample("a", b"u", 4),
        sample("a", b"v", 0, resolution=512),
        sample("b", b"x", 0),
        sample("b", b"y", 1),
    ]
    rewards = [0.5, 0.9, 0.9, None, 0.2, 0.1, 0.4, 0.5]
    pairs, dropped = best_of_n(samples, {}, rewards, {})
    assert bits(pairs) == [(b"y", b"u"), (b"y", b"x")]
    assert (pairs[0].chosen_reward, pairs[0].rejected_reward) == (0.9, 0.2)
    assert dropped == {"between best and worst": 2, "only sample of its prompt": 1, "reward not scored": 1}
    check_books(samples, pairs, dropped)
    row = pairs[0].row(SimpleNamespace(total=-1.0, by_scale=[]), SimpleNamespace(total=-2.0, by_scale=[]), 7)
    assert (row["chosen_source"], row["chosen_seed"], row["rejected_seed"]) == ("step-10", 1, 4)

    pairs, dropped = best_of_n(samples, {}, rewards, {}, margin=0.5)
    assert bits(pairs) == [(b"y", b"u")] and dropped["reward margin too small"] == 2
    same = [sample("a", b"x", 0), sample("a", b"x", 1), sample("a", b"y", 1)]
    assert best_of_n(same, {}, [0.1, 0.2, 0.3], {}) == ([], {"identical bits": 2, "duplicate pair id": 1})


def prompts_of(*rewards: list[float]) -> tuple[list[Sample], list[float]]:
    """For each list a prompt with as many samples."""
    pairs = [(sample(f"p{i}", bytes([i, j]), j), value) for i, row in enumerate(rewards) for j, value in enumerate(row)]
    return [one for one, _ in pairs], [value for _, value in pairs]


@pytest.mark.parametrize(
    ("external", "from_winners", "from_samples"), [(0, 0, 4), (0.5, 4, 4), (0.75, 7, 2), (1, 7, 0)]
)
def test_mixed_keeps_its_shares(external, from_winners, from_samples):
    samples, rewards = prompts_of([0.0], [0.0, 1.0], [1.0], [1.0, 0.0], [0.0], [0.0, 1.0], [0.0], [1.0, 0.0], [0.0])
    winners = {f"p{i}": winner(f"p{i}", b"W") for i in range(9) if i not in (1, 3, 5)}
    pairs, dropped = mixed(samples, winners, rewards, dict.fromkeys(winners, 1.0), external=external)
    kinds = [isinstance(pair.chosen, Winner) for pair in pairs]
    assert (kinds.count(True), kinds.count(False)) == (from_winners, from_samples)
    check_books(samples, pairs, dropped)
    assert 0 not in dropped.values()


@given(
    st.lists(st.lists(st.none() | st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=4), max_size=8),
    st.sets(st.integers(0, 7)),
    st.sampled_from([0.0, 0.25, 0.5]),
    st.booleans(),
    st.floats(0, 1),
)
def test_every_builder_accounts_for_all_samples(rewards, with_winner, margin, flip, external):
    samples, values = prompts_of(*rewards)
    winners = {f"p{i}": winner(f"p{i}", b"W") for i in with_winner}
    of_winners = dict.fromkeys(winners, 0.5)
    check_books(samples, *external_winner(samples, winners, values, of_winners))
    gated, dropped = reward_gated(samples, winners, values, of_winners, margin=margin, flip=flip)
    check_books(samples, gated, dropped)
    ranked, dropped = best_of_n(samples, winners, values, of_winners, margin=margin)
    check_books(samples, ranked, dropped)
    both, dropped = mixed(samples, winners, values, of_winners, external=external, margin=margin)
    check_books(samples, both, dropped)
    assert all(pair.chosen_reward - pair.rejected_reward > margin for pair in gated + ranked)
    outer = sum(isinstance(pair.chosen, Winner) for pair in both)
    # Rounding aside, neither kind has more than its share of all.
    assert abs(outer - external * len(both)) <= 0.5


def test_books_that_do_not_add_up_stop_the_run():
    samples = [sample("a", b"x", 0), sample("a", b"y", 1)]
    pairs, dropped = external_winner(samples, WINNERS, None, None)
    check_books(samples, pairs, dropped)
    with pytest.raises(RuntimeError, match="2 samples; 1 are in pairs and 0 are dropped"):
        check_books(samples, pairs[:1], dropped)
    with pytest.raises(RuntimeError, match="2 samples; 2 are in pairs and 1 are dropped"):
        check_books(samples, pairs, Counter({"odd": 1}))
    with pytest.raises(RuntimeError, match="1 pairs twice, among them 69a945c40a558dde"):
        check_books(samples, [*pairs, pairs[0]], dropped)
    foreign = replace(pairs[0], rejected=sample("a", b"z", 9))
    with pytest.raises(RuntimeError, match="1 samples that it was not given"):
        check_books(samples, [foreign, pairs[1]], dropped)


REWARD = "reward.path=rewards.technical:sharpness"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["builder=rewards.preferences:reward_gated", "+options.margn=1"],
            "reward_gated takes the options margin, flip",
        ),
        (["builder=rewards.preferences:reward_gated", "+options.margin=-1"], "margin=-1: expected 0 or more"),
        (["builder=rewards.preferences:reward_gated", "+options.margin=much"], "{'margin': 'much'}: .*str"),
        (["builder=rewards.preferences:reward_gated", "+options.flip=no"], "flip=no: expected true or false"),
        (["builder=rewards.preferences:mixed", "+options.external=2"], "external=2: expected a share from 0 to 1"),
        (["+options.margin=1"], "external_winner takes no options"),
        (["builder=rewards.preferences:winner"], "has no 'winner'"),
    ],
)
def test_bad_options_are_found_before_a_run(tmp_path, settings, said):
    overrides = [f"preference.{key}" if key[0] != "+" else f"+preference.{key[1:]}" for key in settings]
    with pytest.raises(ValueError, match=said) as raised:
        gather(load_config([f"runs={tmp_path}", REWARD, *overrides]))
    assert len(str(raised.value).splitlines()) == 1


def test_options_reach_the_builder(tmp_path):
    settings = [
        f"runs={tmp_path}",
        "align.methods=[dpo]",
        "reward.path=null",
        "preference.builder=rewards.preferences:reward_gated",
        "+preference.options.flip=true",
    ]
    builder = gather(load_config([*settings, REWARD])).builder
    pairs, _ = builder([sample("a", b"x")], WINNERS, [1.0], {"a": 0.5})
    assert bits(pairs) == [(b"x", b"A")]
    with pytest.raises(ValueError, match="reward_gated needs a reward"):
        gather(load_config(settings))


def test_majority_vote(tmp_path):
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
    assert [pair.rejected.seed for pair in pairs] == [0, 3]
    assert dropped == {"vote tied": 1, "vote lost": 1, "reward not scored": 1}
    check_books(samples, pairs, dropped)
    scores = [SimpleNamespace(total=-3.0, by_scale=[-3.0])] * 2
    write_table(tmp_path / "t.parquet", [pair.row(*scores, 7) for pair in pairs])
    assert list(read_table(tmp_path / "t.parquet").rejected_reward) == [91.1, 1.0]
    with pytest.raises(ValueError, match="reward.path=rewards.combined:WeightedSum"):
        majority_vote(samples[:1], WINNERS, [1.0], {"a": 2.0})


def test_people_are_asked_about_two_samples_of_a_prompt():
    samples = [sample("ab"[seed // 3], bytes([seed]), seed) for seed in range(6)]
    pairs, dropped = human(samples, {}, None, None)
    check_books(samples, pairs, dropped)
    assert len(pairs) == 2 and dropped == {"without a partner": 2}
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [(samples[0], samples[1]), (samples[3], samples[4])]


@pytest.mark.parametrize(
    ("options", "told"), [({"against": "all"}, "expected samples or winners"), ({"share": 0}, "share=0")]
)
def test_people_are_not_asked_with_bad_options(options, told):
    with pytest.raises(ValueError, match=told):
        human([], {}, None, None, **options)
