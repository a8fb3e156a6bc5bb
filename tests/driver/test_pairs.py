"""Pairs: each sample is accounted for once; rounds make the same pairs as one pass; nothing is repeated on resume."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.driver import WorkersDouble, stage_context
from tests.helpers.preferences import row as table_row
from vargpt_rl.data.preferences import ORIGIN, part_path, read_table, write_table
from vargpt_rl.data.samples import Prompt
from vargpt_rl.driver import pairs
from vargpt_rl.driver.grids import show_pairs
from vargpt_rl.driver.judging import NO_REWARDS, judge
from vargpt_rl.driver.pairs import PairRounds, pair
from vargpt_rl.driver.sampling import sample
from vargpt_rl.storage.checkpoint import Policy
from vargpt_rl.storage.images import margins_path

COUNT = 10
POLICY = Policy("", (Path("run/sft/final"),))


class Prompts:
    """A data source of numbered prompts, some of which lack a winner."""

    lines = 0

    def __init__(self, lacking: tuple[str, ...] = ()):
        self.lacking = lacking

    def prompts(self, split, count, seed):
        return [Prompt(str(i), f"prompt {i}") for i in range(count)]

    def winner_key(self, prompt):
        return None if prompt.id in self.lacking else "key"


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Return a stage whose swaps are recorded instead of made."""
    monkeypatch.setattr(pairs, "describe_pairs", lambda context: None)

    def build(name: str, min_pairs: int | None = None, lacking: tuple[str, ...] = ()):
        settings = [f"preference.count={COUNT}", "at.256.dpo.recipe.batch=4", "dpo.recipe.batch=4"]
        settings += ["dpo.recipe.micro_batch=2", f"dpo.min_pairs={min_pairs or 'null'}", "sft.recipe.steps=4"]
        context = stage_context(tmp_path / name, *settings, source=Prompts(lacking), max_bad_fraction=1.0)
        swaps: list[Path] = []
        monkeypatch.setattr(type(context), "swap_to", lambda self, policy: swaps.append(policy.weights[-1]) or {})
        context.pool.swaps = swaps
        return context

    return build


def in_one_pass(context) -> dict:
    sample(context, POLICY)
    return pair(context, POLICY, judge(context))


def generated(context) -> list[int]:
    return sorted(seed for name, jobs in context.pool.calls if name == "generate_images" for _, seed in jobs)


def test_rounds_make_the_same_pairs_as_one_pass(make):
    once, rounds = make("once"), make("rounds", 4)
    counts = in_one_pass(once)
    work = PairRounds(rounds, POLICY)
    assert list(work.write()) == [4, 8, 10]
    result = work.join()
    assert generated(once) == generated(rounds) and result["rollout"]["images"] == COUNT
    tables = [read_table(context.table()) for context in (once, rounds)]
    assert set(tables[0].pair_id) == set(tables[1].pair_id) and tables[1].pair_id.is_unique
    assert [set(tables[1].prompt_id[at : at + 4]) for at in (0, 4, 8)] == [set("0123"), set("4567"), set("89")]
    assert tables[1].attrs[ORIGIN]["parts"] == [4, 4, 2] and "parts" not in tables[0].attrs[ORIGIN]
    assert {key: result["pairs"][key] for key in counts} == counts
    margins = [json.loads(margins_path(context.table()).read_text()) for context in (once, rounds)]
    assert margins[0] == margins[1] and set(margins[0]["reward"]) == set(tables[0].pair_id)


def test_workers_hold_the_reference_from_the_first_round_on(make):
    context = make("rounds", 4)
    list(PairRounds(context, POLICY).write())
    assert [path.name for path in context.pool.swaps] == ["step-000002", "final", "final", "final", "final"]


def test_dropped_samples_are_counted_and_a_round_may_be_empty(make):
    rounds = make("rounds", 4, lacking=("4", "5", "6", "7", "9"))
    work = PairRounds(rounds, POLICY)
    assert list(work.write()) == [4, 4, 5]
    counts = work.join()["pairs"]
    assert (counts["built"], counts["dropped"]) == (5, 5)
    assert counts["dropped_by_reason"] == {"no winner": 5} and counts["prompts_without_winner"] == 5


@pytest.mark.parametrize("min_pairs", [None, 4])
def test_no_pair_at_all_is_an_error(make, min_pairs):
    context = make("none", min_pairs, lacking=tuple(map(str, range(COUNT))))
    with pytest.raises(ValueError, match="no pair could be built of 10 samples; dropped: {'no winner': 10}"):
        if min_pairs:
            work = PairRounds(context, POLICY)
            list(work.write())
            work.join()
        else:
            in_one_pass(context)


def test_the_report_of_rewards_counts_all_rounds(make, monkeypatch):
    def judged(context, rollouts, reward, keep):
        term = {
            "scored": len(rollouts.samples),
            "mean": 1.0,
            "seconds": 0.5,
            "restarts": 0,
            "unscored": {},
            "errors": {},
        }
        return NO_REWARDS, {"reward": term}

    monkeypatch.setattr(pairs, "judge_rollouts", judged)
    work = PairRounds(make("rounds", 4), POLICY)
    list(work.write())
    report = work.join()["pairs"]["rewards"]["reward"]
    assert (report["scored"], report["seconds"]) == (COUNT, 1.5)


def test_existing_parts_are_kept(make):
    whole, cut = make("whole", 4), make("cut", 4)
    work = PairRounds(whole, POLICY)
    list(work.write())
    work.join()
    interrupted = PairRounds(cut, POLICY).write()
    next(interrupted)
    interrupted.close()
    first = part_path(cut.table(), 0).read_bytes()
    done = generated(cut)
    resumed = replace(cut, session=replace(cut.session, pool=WorkersDouble()))
    again = PairRounds(resumed, POLICY)
    assert list(again.write()) == [4, 8, 10]
    again.join()
    assert part_path(cut.table(), 0).read_bytes() == first
    assert len(done) > 4, "the earlier checkpoint had drawn for all rounds"
    assert len(done) + len(generated(resumed)) == COUNT, "nothing is drawn again"
    assert read_table(cut.table()).equals(read_table(whole.table()))


def test_pairs_are_shown_with_both_images(tmp_path):
    context = stage_context(tmp_path)
    write_table(tmp_path / "t.parquet", [table_row("a"), table_row("b", prompt="two", rejected_bits=b"\x03")])
    table = read_table(tmp_path / "t.parquet")
    shown = []
    seen = []

    def check(items, resolution, check):
        seen.extend((prompt.text, bits) for prompt, bits in items)
        return check([Image.new("RGB", (64, 64), "red")] * len(items), [prompt for prompt, _ in items])

    context.pool.check = check
    context.run.log_table = lambda name, table, labels: shown.append((name, table))
    show_pairs(context, table.head(0))
    show_pairs(context, table)
    [(name, columns)] = shown
    assert name == "pairs/table" and list(columns.prompt) == ["a red circle", "two"]
    assert seen[1] == ("two", b"\x03") and seen[3][1] == b"\x00\xff"
    folder = context.run.directory / "images/iter-00-pairs"
    assert list(columns.chosen) == [folder / f"{name}-chosen.webp" for name in "ab"]
    for path in (*columns.chosen, *columns.rejected):
        with Image.open(path) as image:
            assert image.format == "WEBP"
