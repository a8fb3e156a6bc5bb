"""Statistics of preference tables small enough to count by hand."""

import pandas as pd
import pytest

from tests.helpers.preferences import row
from vargpt_rl.data.pair_statistics import describe, repeats, scale_margins, sources, statistics
from vargpt_rl.data.preferences import main, read_table, write_table

ORIGIN = {"samples": 7, "prompts": 4, "prompts_without_winner": 1, "dropped_by_reason": {"no winner": 3}}
ROWS = [
    row("a", rejected_reward=0.0, chosen_source="crisp/17/a red circle"),
    row("b", rejected_reward=1.5, rejected_bits=b"\x02", chosen_source="crisp/18/a red circle"),
    row("c", chosen_source="sft/final", chosen_seed=4, reference_chosen_logp=-20.0),
    row("d", prompt_id="q", chosen_bits=b"\x01", rejected_source="step-90", reference_chosen_by_scale=[-2.0, -4.0]),
]


@pytest.fixture
def table(tmp_path) -> pd.DataFrame:
    write_table(tmp_path / "t.parquet", ROWS, ORIGIN)
    return read_table(tmp_path / "t.parquet")


def test_margins_and_their_histograms(table):
    found = statistics(table)
    assert (found["pairs"], found["prompts"]) == (4, 2)
    reward = {key: found[f"reward_margin/{key}"] for key in ("mean", "median", "min", "max", "positive")}
    assert reward == {"mean": 0.25, "median": 0.25, "min": -0.5, "max": 1.0, "positive": 0.5}
    assert [found[f"reference_margin/{key}"] for key in ("mean", "median", "min", "max")] == [0.0, 2.5, -7.5, 2.5]
    counts, edges = found["reference_margin/counts"], found["reference_margin/edges"]
    assert counts[0] == 1 and counts[-1] == 3 and sum(counts) == 4
    assert (edges[0], edges[-1], len(edges)) == (-7.5, 2.5, len(counts) + 1)
    assert [found[f"reference_margin/scale_{k}"] for k in range(2)] == [9.0, -5.5]


def test_without_rewards_there_is_no_reward_margin(table):
    table["rejected_reward"] = None
    assert not [key for key in statistics(table) if key.startswith("reward_margin")]
    assert "reward" not in describe(table)


def test_winners_are_told_by_their_folder_and_drawings_by_their_checkpoint(table):
    assert sources(table, "chosen").to_dict() == {"crisp": 2, "shapes": 1, "sft/final": 1}
    found = statistics(table)
    assert found["source/rejected/step-10"] == 0.75 and found["source/chosen/sft/final"] == 0.25


def test_repeats_are_counted(table):
    expected = {
        "pair id": 0,
        "prompt": 3,
        "chosen image": 2,
        "rejected image": 1,
        "pair of images": 1,
        "image on both sides": 1,
    }
    assert repeats(table) == expected
    assert {f"repeated/{name}": count for name, count in expected.items()}.items() <= statistics(table).items()


def test_what_was_dropped_is_said(table):
    found = statistics(table)
    assert (found["samples"], found["prompts_without_winner"], found["dropped/no winner"]) == (7, 1, 3)


def test_a_table_of_two_resolutions_is_described_in_two_parts(tmp_path, capsys):
    path = tmp_path / "t.parquet"
    other = row("e", resolution=512, reference_chosen_by_scale=[-1.0], reference_rejected_by_scale=[-3.0])
    write_table(path, [*ROWS, other], ORIGIN)
    with pytest.raises(ValueError, match="differ in how many scales"):
        scale_margins(read_table(path))
    assert main(["describe", str(path)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in [
        "4 pairs of 2 prompts at 256 px",
        "1 pairs of 1 prompts at 512 px",
        "count mean std min 25% 50% 75% max",
        "reward 2.0 0.25 1.0607 -0.5 -0.125 0.25 0.625 1.0",
        "reference 4.0 0.00 5.0000 -7.5 0.000 2.50 2.500 2.5",
        f"2 to 2.5 3 {'#' * 40}",
        "1 -5.5",
        "crisp 2 0.50",
        "step-90 1 0.25",
        "image on both sides 1",
        "prompts without winner 1",
        "dropped: no winner 3",
    ]:
        assert line in lines, (line, lines)
    write_table(path, [])
    assert describe(read_table(path)) == "0 pairs"
