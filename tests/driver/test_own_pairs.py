"""Pairs that came from files take the place of samples: encoded once, scored once, held-out ones measured."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from actors.worker import EncodedImage, Failure
from tests.helpers.driver import WorkersDouble, stage_context
from vargpt_rl import loop
from vargpt_rl.data.own_pairs import OwnPair, OwnPairs
from vargpt_rl.data.preferences import ORIGIN, read_table
from vargpt_rl.data.samples import Prompt
from vargpt_rl.driver import own_pairs
from vargpt_rl.driver.agreement import agreements, margins_of
from vargpt_rl.driver.evaluation import fix_held_out_pairs, preference_metrics
from vargpt_rl.driver.own_pairs import encode_own_pairs, encoded_path, pair_own, read_encoded
from vargpt_rl.driver.report import _people
from vargpt_rl.driver.session import StageContext
from vargpt_rl.storage.checkpoint import Policy

POLICY = Policy("")
KEYS = ("a", "b", "c", "bad")


class KeyedWorkers(WorkersDouble):
    """Images are their keys; "bad" cannot be decoded."""

    def encode(self, keys, resolution):
        return [
            Failure(key, "torn") if key == "bad" else EncodedImage(key, key[:1].encode(), None)  # "aa" equals "a"
            for key in keys
        ]

    def reward(self, items, resolution, rewards):
        return [float(bits == b"a") for _, bits in items]


def own(number, chosen, rejected):
    return OwnPair(f"pair{number}", Prompt(f"p{number}", f"prompt {number}"), chosen, rejected, f"pairs.jsonl:{number}")


@pytest.fixture
def context(tmp_path, monkeypatch):
    pairs = [own(0, "a", "b"), own(1, "b", "a"), own(2, "a", "bad"), own(3, "a", "aa"), own(4, "c", "a")]
    given = OwnPairs(pairs, Counter({"tie": 2}), lines=7, held_out=frozenset({"p4"}))
    settings = ["preference.pairs=FILE", "dpo.recipe.batch=4", "dpo.recipe.micro_batch=2", "at.256.dpo.recipe.batch=4"]
    monkeypatch.setattr(own_pairs, "describe_pairs", lambda context: None)
    monkeypatch.setattr(StageContext, "swap_to", lambda self, policy: {})
    return stage_context(tmp_path, *settings, pool=KeyedWorkers(), pairs=given, max_bad_fraction=1.0)


def test_each_image_is_encoded_once_and_what_is_left_out_is_counted(context):
    assert encode_own_pairs(context, POLICY)["pairs"] == 3
    [(_, keys)] = context.pool.calls
    assert sorted(keys) == ["a", "aa", "b", "bad", "c"]
    found = read_encoded(encoded_path(context), context.resolution, "train")
    assert [pair.pair_id for pair in found.pairs] == ["pair0", "pair1"]
    assert found.left_out == {"tie": 2, "unreadable image": 1, "identical bits": 1}
    lost = json.loads(context.inputs.quarantine.path.read_text())
    assert lost["source"] == "pairs.jsonl:2" and lost["reason"] == "torn"


def test_a_later_iteration_of_a_resolution_encodes_nothing(context):
    encode_own_pairs(context, POLICY)
    calls = len(context.pool.calls)
    assert encode_own_pairs(replace(context, iteration=1), POLICY) == {"images": 0}
    assert len(context.pool.calls) == calls


def test_too_many_images_that_cannot_be_decoded_stop_the_run(context):
    strict = replace(context.inputs, max_bad_fraction=0.01)
    strict.source.lines = 7
    with pytest.raises(ValueError, match="1 of 7 records are bad"):
        encode_own_pairs(replace(context, session=replace(context.session, inputs=strict)), POLICY)


def test_damage_of_the_encoded_pairs_is_found(context):
    encode_own_pairs(context, POLICY)
    path = encoded_path(context)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"32\.parquet: not encoded pairs"):
        read_encoded(path, 32, "train")


def test_the_table_has_the_pairs_and_the_agreement_of_the_reward(context):
    encode_own_pairs(context, POLICY)
    rewarded = replace(context.inputs, reward=lambda images, prompts: None)
    session = replace(context.session, inputs=rewarded)
    session.rewards.use = lambda reward: RunningRewardDouble()
    result = pair_own(replace(context, session=session), POLICY)
    table = read_table(context.table())
    assert dict(zip(table.pair_id, table.chosen_source, strict=True)) == {"pair0": "a", "pair1": "b"}
    assert table.chosen_reward.tolist() != table.rejected_reward.tolist() and table.chosen_seed.isna().all()
    assert table.attrs[ORIGIN]["samples"] == 0 and table.attrs[ORIGIN]["dropped_by_reason"]["tie"] == 2
    assert (result["built"], result["dropped"]) == (2, 4)
    assert result["people"]["reward"] == pytest.approx({"right": 1.0, "n": 2, "low": 0.0945, "high": 0.9055}, abs=1e-3)
    told = _people(result)
    assert told[0].startswith("2 pairs judged by people; left out: 2 tie")
    assert told[1] == "reward agrees with people on 1 of 2 pairs: 0.50 (0.09 to 0.91)"


class RunningRewardDouble:
    """A running reward without a report."""

    def renewed(self):
        return self

    def report(self):
        return {}


def test_held_out_pairs_are_measured_and_not_trained_on(context):
    encode_own_pairs(context, POLICY)
    assert fix_held_out_pairs(context, []) == {"pairs": 1}
    assert read_table(context.table("held-out")).pair_id.tolist() == ["pair4"]
    assert "accuracy" in preference_metrics(context)
    context.table("held-out").unlink()
    assert preference_metrics(context) == {}


def test_nothing_is_drawn_for_pairs_that_are_there(context, monkeypatch):
    asked = []
    monkeypatch.setattr(StageContext, "step", lambda self, step, work, *args: asked.append(step) or {})
    loop.align(context, POLICY)
    assert asked[:6] == ["before", "sft", "sft_swap", "encode", "after_sft", "pair"]
    assert not {"sample", "judge", "propose"} & set(asked)


def test_ties_of_a_reward_count_half_and_unscored_pairs_not_at_all():
    assert agreements({"a": [1.0, 0.0, None], "b": [None]})["a"]["right"] == 1.5
    assert list(agreements({"a": [1.0, 0.0, None], "b": [None]})) == ["a"]
    assert margins_of([(2.0, 1.0), (None, 1.0)]) == {"reward": [1.0, None]}
