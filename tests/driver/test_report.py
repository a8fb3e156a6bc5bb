"""The closing tables."""

from pathlib import Path

import pytest
from rich.console import Console

from vargpt_rl.common.console import fitted
from vargpt_rl.driver.report import (
    closing_table,
    comparison_table,
    method_table,
    show,
    training_time,
    verdicts,
)

RESULT = {
    "reward_first": 0.5,
    "reward_last": 0.75,
    "diversity_first": 0.2,
    "diversity_last": 0.1,
    "seconds_per_batch": {"draw": 1.0, "judge": 2.0, "learn": 3.0, "swap": 0.5},
}
LEARNED = {
    "accuracy_own": 0.6,
    "accuracy_own_low": 0.51,
    "accuracy_own_high": 0.69,
    "agreement": 0.55,
    "agreement_stderr": 0.1,
}
SCORE = {"overall": 0.7, "overall_low": 0.61, "overall_high": 0.77, "n": 120}
NOTHING: dict = {"stages": {}, "understanding": {}, "best": [], "quarantined": {}, "events": [], "seconds": 1.0}


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
    show(NOTHING | {"iterations": [iteration]}, Path("runs/a"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "own images 0.600 (0.51 to 0.69), agreement with the exact check on held-out images 0.550 ± 0.100" in shown


GAIN = {
    f"gain_over_{name}{key}": value
    for name in ("sft", "control")
    for key, value in {"": 0.175, "_stderr": 0.045, "_better": 27, "_worse": 6, "_alike": 87, "_p": 0.00032}.items()
}


def cells_of(table):
    return {f"{i} {column.header}": list(column.cells) for i, column in enumerate(table.columns)}


def test_the_tables_show_scores_rewards_and_comparisons_in_100_columns():
    after = SCORE | GAIN | {"margin": -50.37, "accuracy": 0.067, "reward": 0.71, "judge": 0.52}
    measured = {"after_sft": SCORE, "sft_on_winners": SCORE, "after_dpo": after, "after_online_dpo": after}
    summary = {"iterations": [{"resolution": 512, "sft": {}, "eval": measured}]}
    cells = cells_of(closing_table(summary))
    assert cells["2 policy"] == ["after SFT", "control", "after DPO", "after online DPO"]
    assert cells["4 score"] == ["0.700 (0.61 to 0.77)"] * 4 and cells["3 n"] == ["120"] * 4
    assert cells["5 reward"] == ["-", "-", "0.710", "0.710"] and cells["6 judge"] == ["-", "-", "0.520", "0.520"]
    cells = cells_of(comparison_table(summary))
    assert cells["2 policy"] == ["DPO", "online DPO"]
    assert cells["3 over SFT"] == ["+0.175 ± 0.045 (+27 -6)"] * 2 and cells["4 p"] == ["0.00032"] * 2
    for table in (closing_table(summary), comparison_table(summary)):
        assert Console(width=100).measure(table).minimum <= 100


def test_a_sentence_says_what_the_last_policy_of_an_iteration_shows():
    measured = {"after_sft": SCORE, "sft_on_winners": SCORE | GAIN, "after_dpo": SCORE, "after_grpo": SCORE | GAIN}
    [sentence] = verdicts({"iterations": [{"resolution": 256, "sft": {}, "eval": measured}]})
    assert sentence == (
        "iteration 0, 256 px: GRPO against SFT on the same 120 images: 27 better, 6 worse, 87 alike; +0.175 "
        "(95 %: +0.09 to +0.26), sign test p = 0.00032: better"
    )


def test_a_run_without_sft_is_compared_with_its_start():
    summary = {"iterations": [{"resolution": 256, "eval": {"after_sft": SCORE, "after_grpo": SCORE | GAIN}}]}
    assert cells_of(closing_table(summary))["2 policy"] == ["start", "after GRPO"]
    assert cells_of(comparison_table(summary))["3 over start"] == ["+0.175 ± 0.045 (+27 -6)"]
    assert verdicts(summary)[0].startswith("iteration 0, 256 px: GRPO against the start on the same 120 images")


def test_a_run_without_scores_shows_what_it_has(capsys):
    """A captioned run without reward or judge has pairs alone."""
    pairs = {"n": 4, "margin": 1.5, "accuracy": 0.75}
    iteration = {"resolution": 64, "eval": {"after_sft": {"n": 4, "pairs": 4}, "after_dpo": pairs}}
    show(NOTHING | {"iterations": [iteration], "best": [], "events": ["a note"]}, Path("runs/a"))
    shown = capsys.readouterr().out
    assert "0.750" in shown and "a note" in shown and "runs/a" in shown


def test_the_best_of_each_resolution_is_named(capsys):
    best = [
        {"path": f"best/{size}", "metric": "after_grpo.overall", "value": 0.5, "iteration": k, "resolution": size}
        for k, size in enumerate((128, 256))
    ]
    show(NOTHING | {"iterations": [], "best": best}, Path("runs/a"))
    shown = capsys.readouterr().out
    assert "best/256 holds the policy of iteration 1: after_grpo.overall 0.5" in shown


EXACT = SCORE | {"n": 120, "single object": 1.0}
HALF = {"overall": 0.5, "overall_low": 0.4, "overall_high": 0.6}
JUDGED = HALF | {"n": 60, "judge": 0.5, "judge_low": 0.4, "judge_high": 0.6}
REWARDED = HALF | {"n": 60, "reward": 0.3, "reward_low": 0.2, "reward_high": 0.4}
PAIRS = {"margin": 2.0, "accuracy": 0.875, "accuracy_low": 0.53, "accuracy_high": 0.98}
KINDS = {
    "shapes with its own reward": (REWARDED | EXACT | PAIRS, "0.700 (0.61 to 0.77)", "0.300 (0.20 to 0.40)"),
    "captioned without a reward": ({"n": 60} | PAIRS, "-", None),
    "records with a judge": (JUDGED | PAIRS, "0.500 (0.40 to 0.60)", None),
    "records with a reward": (REWARDED | PAIRS, "0.500 (0.40 to 0.60)", "0.300 (0.20 to 0.40)"),
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
        "best": [],
        "quarantined": {},
        "events": [],
        "seconds": 1.0,
    }
    table = closing_table(summary)
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert cells["score"] == ["-", score] and cells["accuracy"] == ["-", "0.875 (0.53 to 0.98)"]
    assert cells.get("reward", ["-", None])[1] == reward
    show(summary, Path("runs/a"))
    shown = capsys.readouterr().out
    assert "after DPO" in " ".join(shown.split()) and "runs/a" in shown
    tables, _, _ = shown.partition("1 s; everything")
    assert max(map(len, tables.splitlines())) <= int(columns)


@pytest.mark.parametrize("name", ["exp[lr3]", "a[/x]b", ":smile:", "[red]", "a" * 90])
def test_folders_and_events_are_shown_as_they_are(name, tmp_path, capsys):
    folder = tmp_path / name
    (folder / "model").mkdir(parents=True)
    (folder / "report.html").touch()
    show(NOTHING | {"iterations": [], "events": [f"worker lost: {name}"]}, folder)
    shown = capsys.readouterr().out
    assert f"everything is in {folder}\n" in shown and f"look at   {folder}/report.html\n" in shown
    assert f"worker lost: {name}" in shown and f"checkpoint={folder}/model" in shown.replace("'", "")


@pytest.mark.parametrize(
    ("measured", "title"),
    [
        ({"after_sft": SCORE, "after_grpo": SCORE}, "held-out images"),
        ({"after_sft": SCORE, "after_dpo": SCORE | PAIRS}, "held-out images and pairs"),
        (
            {"after_sft": SCORE, "sft_on_winners": SCORE | PAIRS, "after_dpo": SCORE | PAIRS},
            "held-out images and pairs (control: SFT on the winners)",
        ),
    ],
)
def test_the_closing_table_names_only_what_it_has(measured, title):
    summary = {"iterations": [{"resolution": 256, "eval": {"sft_on_winners": None} | measured}]}
    assert closing_table(summary).title == title


def test_a_reward_that_is_the_score_has_no_column_of_its_own():
    measured = {"after_sft": SCORE | {"reward": 0.7}, "after_grpo": SCORE | {"reward": 0.7}}
    cells = {str(c.header): c for c in closing_table({"iterations": [{"resolution": 256, "eval": measured}]}).columns}
    assert "score = reward" in cells and "reward" not in cells
    measured["after_grpo"]["reward"] = 0.6
    cells = {str(c.header): c for c in closing_table({"iterations": [{"resolution": 256, "eval": measured}]}).columns}
    assert "score" in cells and "reward" in cells


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


@pytest.mark.parametrize("width", [60, 100])
def test_nothing_is_cut_off_in_a_narrow_terminal(width):
    after = SCORE | GAIN | {"margin": -50.37, "accuracy": 0.067, "reward": 0.71, "judge": 0.52}
    iteration = {"resolution": 256, "grpo": RESULT, "eval": {"after_sft": SCORE, "after_grpo": after}}
    summary = NOTHING | {"iterations": [iteration] * 2}
    for table in (closing_table(summary), comparison_table(summary), method_table(summary["iterations"])):
        console = Console(width=width)
        with console.capture() as caught:
            console.print(fitted(table, width))
        text = caught.get()
        assert "…" not in text and max(map(len, text.splitlines())) <= width
        cells = {str(cell) for column in table.columns for cell in column.cells} - {"-"}
        words = " ".join(text.split())
        assert all(" ".join(cell.split()) in words for cell in cells), words


def test_a_narrow_terminal_names_each_value(capsys):
    table = method_table([{"resolution": 256, "grpo": RESULT, "eval": {}}])
    lines = str(fitted(table, 60)).splitlines()
    assert lines[1] == "iteration 0, 256 px, GRPO"
    assert lines[2].startswith("  reward 0.500 -> 0.750; diversity 0.200 -> 0.100;") and "judge -" not in lines[2]
