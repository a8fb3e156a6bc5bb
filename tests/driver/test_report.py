"""The closing tables."""

from pathlib import Path

import pytest
from rich.console import Console

from vargpt_rl.driver.report import closing_table, method_table, show, training_time

RESULT = {
    "reward_first": 0.5,
    "reward_last": 0.75,
    "diversity_first": 0.2,
    "diversity_last": 0.1,
    "seconds_per_update": {"draw": 1.0, "judge": 2.0, "learn": 3.0, "swap": 0.5},
}
LEARNED = {"accuracy_own": 0.6, "accuracy_own_stderr": 0.05, "agreement": 0.55, "agreement_stderr": 0.1}
SCORE = {"overall": 0.7, "overall_stderr": 0.04}


def test_online_methods_show_their_figures_and_their_time():
    iteration = {"resolution": 256, "grpo": RESULT, "eval": {"after_grpo": SCORE, "sft_on_winners": None}}
    table = method_table([iteration])
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert cells["method"] == ["GRPO"]
    assert (
        cells["reward"] == ["0.500 -> 0.750"] and cells["judge"] == ["-"] and cells["diversity"] == ["0.200 -> 0.100"]
    )
    assert [cells[f"{part} s"] for part in ("draw", "judge", "learn", "swap")] == [["1.0"], ["2.0"], ["3.0"], ["0.5"]]


def test_a_learned_reward_shows_its_agreement(capsys):
    iteration = {"resolution": 256, "learned_reward": LEARNED, "eval": {"after_sft": SCORE}}
    nothing: dict = {"stages": {}, "understanding": {}, "best": None, "quarantined": {}, "events": [], "seconds": 1.0}
    show(nothing | {"iterations": [iteration]}, Path("runs/a"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "own images 0.600 ± 0.050, agreement with the exact check on held-out images 0.550 ± 0.100" in shown


def test_the_closing_table_compares_with_sft_and_control_in_100_columns():
    gain = {"gain_over_sft": 0.175, "gain_over_sft_stderr": 0.045, "gain_over_control": -0.0174}
    after = SCORE | gain | {"gain_over_control_stderr": 0.046, "margin": -50.37, "accuracy": 0.067}
    measured = {"after_sft": SCORE, "sft_on_winners": SCORE, "after_dpo": after, "after_online_dpo": after}
    table = closing_table({"iterations": [{"resolution": 512, "eval": measured}]})
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert cells["policy"] == ["after SFT", "control", "after DPO", "after online DPO"]
    assert "reward" not in cells and cells["n"] == ["-"] * 4
    assert cells["over SFT"] == ["-", "-", *["+0.175 ± 0.045"] * 2]
    assert cells["over control"] == ["-", "-", *["-0.017 ± 0.046"] * 2]
    console = Console(width=100)
    assert console.measure(table).minimum <= 100


EXACT = SCORE | {"n": 120, "single object": 1.0}
JUDGED = {"n": 60, "overall": 0.5, "overall_stderr": 0.1, "judge": 0.5, "judge_stderr": 0.1}
REWARDED = {"n": 60, "overall": 0.3, "overall_stderr": 0.1, "reward": 0.3, "reward_stderr": 0.1}
PAIRS = {"margin": 2.0, "accuracy": 0.875}
KINDS = {
    "shapes with a reward of its own": (EXACT | REWARDED | EXACT | PAIRS, "0.700 ± 0.040", "0.300 ± 0.100"),
    "captioned without a reward": ({"n": 60} | PAIRS, "-", None),
    "records with a judge": (JUDGED | PAIRS, "0.500 ± 0.100", None),
    "records with a reward": (REWARDED | PAIRS, "0.300 ± 0.100", "0.300 ± 0.100"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", ["60", "100"])
def test_every_kind_of_data_shows_its_closing_table(kind, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    result, score, reward = KINDS[kind]
    stage = {"resolution": 128, "steps": 4, "loss_first": 2.0, "loss_last": 1.0, "before": {}, "eval": {}}
    summary = {
        "stages": {"pretrain": stage},
        "iterations": [{"resolution": 128, "eval": {"after_sft": {"pairs": 9}, "after_dpo": result}}],
        "understanding": {"before": {}, "after": {}},
        "best": None,
        "quarantined": {},
        "events": [],
        "seconds": 1.0,
    }
    table = closing_table(summary)
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert cells["score"] == ["-", score] and cells["accuracy"] == ["-", "0.875"]
    assert cells.get("reward", ["-", None])[1] == reward
    show(summary, Path("runs/a"))
    shown = capsys.readouterr().out
    assert "after DPO" in " ".join(shown.split()) and "runs/a" in shown


def test_training_time_is_shared_among_parts():
    summary = {
        "stages": {"pretrain": {"steps": 2, "time": {"data": 1.0, "forward": 4.0}, "swap": {"seconds": 9.0}}},
        "iterations": [{"resolution": 32, "sft": {"time": {"forward": 3.0}}, "dpo": {"time": {"wait": 2.0}}}],
    }
    assert training_time(summary) == "data 10%, forward 70%, wait 20%"
    summary["iterations"] = [{"sft": {"time": {"forward": 3.0}, "mfu": share}} for share in (0.2, 0.4)]
    assert training_time(summary) == "data 9%, forward 91%; model FLOPs utilisation: sft 30%"


def test_a_run_without_training_has_no_such_line():
    assert training_time({"stages": {}, "iterations": []}) == ""
