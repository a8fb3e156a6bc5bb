"""Pairs that a reward is learned from: split by prompt, kinds, batches."""

import pandas as pd
import pytest
import torch
from PIL import Image

from vargpt_rl.data.reward_pairs import (
    OWN,
    WINNERS,
    RewardPair,
    RewardPairCollator,
    check_split,
    pair_kinds,
    read_pairs_file,
    reward_inputs,
    split_by_prompt,
    write_pairs_file,
)


def rows(count: int = 200) -> pd.DataFrame:
    """Pairs of 50 different prompts under ids of their own."""
    return pd.DataFrame({"prompt_id": range(count), "prompt": [f"a thing {i % 50}" for i in range(count)]})


def test_no_prompt_is_on_both_sides():
    train, held_out = split_by_prompt(rows(), 0.2, seed=0)
    assert len(train) + len(held_out) == 200 and not set(train.prompt) & set(held_out.prompt)
    assert 3 <= held_out.prompt.nunique() <= 20


def test_the_split_depends_on_text_and_seed_alone():
    more = pd.concat([rows(), rows(50).assign(prompt="another")])
    before, after = (set(split_by_prompt(table, 0.2, seed=0)[1].prompt) for table in (rows(), more))
    assert before == after - {"another"}
    assert before != set(split_by_prompt(rows(), 0.2, seed=1)[1].prompt)


@pytest.mark.parametrize(("batch", "fraction"), [(300, 0.2), (8, 1e-9)])
def test_too_few_pairs_are_refused(batch, fraction):
    with pytest.raises(ValueError, match=r"t\.parquet: 200 pairs of 50 prompts leave .* expected at least a batch"):
        check_split(rows(), fraction, 0, batch, "t.parquet")


def test_a_pair_without_a_version_has_a_winner():
    versions = {"chosen_version": [None, 3, 3], "rejected_version": [2, 2, None]}
    table = pd.DataFrame(versions, dtype=pd.Int64Dtype())
    assert pair_kinds(table).tolist() == [WINNERS, OWN, WINNERS]


def test_batches_hold_all_chosen_then_all_rejected(chat, tmp_path):
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / name)
    write_pairs_file(tmp_path, [RewardPair("a red square", "a.png", "b.png"), RewardPair("a circle", "b.png", "a.png")])
    batch = RewardPairCollator(chat, tmp_path)(read_pairs_file(tmp_path))
    images = [Image.open(tmp_path / name) for name in ("a.png", "b.png", "b.png", "a.png")]
    expected = reward_inputs(chat, images, ["a red square", "a circle"] * 2)
    assert batch.keys() == expected.keys() and all(torch.equal(batch[key], expected[key]) for key in batch)
    assert len(batch["input_ids"]) == 4
