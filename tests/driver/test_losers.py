"""Pairs in rounds: the same drawings as at once, each in the books once, and no part is made twice."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from actors.config import RolloutConfig
from actors.worker import EncodedImage, ImageScore
from rewards.preferences import external_winner
from tests.helpers.pools import FakePool
from vargpt_rl.data.preferences import ORIGIN, part_path, read_table
from vargpt_rl.data.samples import Prompt, Sample
from vargpt_rl.driver.losers import Losers
from vargpt_rl.driver.rollout import Rollouts
from vargpt_rl.driver.run import Run

COUNT = 10
EARLY, FINAL = (Path("run/sft/step-000002"),), (Path("run/sft/final"),)


class EvenPool(FakePool):
    """Stands in for the workers: images are their seeds, and every image is as likely."""

    version, config = 1, RolloutConfig()

    def __init__(self):
        self.drawn = []

    def generate_images(self, jobs, resolution, sampling, name):
        self.drawn += [(name, seed) for _, seed in jobs]
        return [Sample(prompt, bytes([seed]), resolution, seed, {}, 1, name) for prompt, seed in jobs]

    def encode(self, keys, resolution):
        return [EncodedImage(key, b"\xff", None) for key in keys]

    def score(self, items, resolution):
        return [ImageScore(-1.0, [-1.0], [0.5])] * len(items)


@pytest.fixture
def losers(tmp_path):
    def build(name: str, size: int, lacking: tuple[str, ...] = ()) -> Losers:
        source = SimpleNamespace(winner_key=lambda prompt: None if prompt.id in lacking else "key")
        rollouts = Rollouts(EvenPool(), source, Run(tmp_path / "run", {}), None, None)
        rollouts.served = []
        rollouts.serve = rollouts.served.append
        prompts = [Prompt(str(i), f"prompt {i}") for i in range(COUNT)]
        whose = np.arange(COUNT) % 2
        table = tmp_path / f"{name}.parquet"
        return Losers(rollouts, table, prompts, list(range(COUNT)), [EARLY, FINAL], whose, 32, size)

    return build


def make(losers: Losers) -> list[int]:
    return list(losers.make(external_winner, None, 2))


def test_rounds_pair_the_same_drawings_as_one(losers):
    once, rounds = losers("once", COUNT), losers("rounds", 4)
    assert make(once) == [10] and make(rounds) == [4, 8, 10]
    assert sorted(once.rollouts.pool.drawn) == sorted(rounds.rollouts.pool.drawn) and rounds.drawn == COUNT
    tables = [read_table(each.table) for each in (once, rounds)]
    assert set(tables[0].pair_id) == set(tables[1].pair_id) and tables[1].pair_id.is_unique
    assert [set(tables[1].prompt_id[at : at + 4]) for at in (0, 4, 8)] == [set("0123"), set("4567"), set("89")]
    assert tables[1].attrs[ORIGIN]["parts"] == [4, 4, 2] and "parts" not in tables[0].attrs[ORIGIN]
    same = ("built", "dropped", "samples", "prompts", "prompts_without_winner", "dropped_by_reason")
    assert {key: once.counts[key] for key in same} == {key: rounds.counts[key] for key in same}


def test_the_workers_keep_the_final_weights_from_the_first_round_on(losers):
    rounds = losers("rounds", 4)
    make(rounds)
    served = rounds.rollouts.served
    assert served[0] == EARLY and set(served[1:]) == {FINAL}
    assert [name for name, _ in rounds.rollouts.pool.drawn] == ["sft/step-000002"] * 5 + ["sft/final"] * 5


def test_what_was_dropped_adds_up_and_a_round_may_be_empty(losers):
    rounds = losers("rounds", 4, lacking=("4", "5", "6", "7", "9"))
    assert make(rounds) == [4, 4, 5]
    assert (rounds.counts["built"], rounds.counts["dropped"]) == (5, 5)
    assert rounds.counts["dropped_by_reason"] == {"no winner": 5} and rounds.counts["prompts_without_winner"] == 5
    for size in (4, COUNT):
        with pytest.raises(ValueError, match="no pair could be built of 10 samples; dropped: {'no winner': 10}"):
            make(losers(f"none-{size}", size, lacking=tuple(map(str, range(COUNT)))))


def test_parts_that_are_there_are_not_made_again(losers):
    whole, cut = losers("whole", 4), losers("cut", 4)
    make(whole)
    work = cut.make(external_winner, None, 2)
    next(work)
    work.close()
    first = part_path(cut.table, 0).read_bytes()
    again = losers("cut", 4)
    assert make(again) == [4, 8, 10]
    assert part_path(again.table, 0).read_bytes() == first
    assert sorted(seed for _, seed in again.rollouts.pool.drawn) == [4, 5, 6, 7, 8, 9]
    assert read_table(again.table).equals(read_table(whole.table))
