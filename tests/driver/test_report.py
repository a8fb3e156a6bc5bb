"""The closing tables."""

from rich.console import Console

from vargpt_rl.driver.report import closing_table, method_table, show

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
    show(nothing | {"iterations": [iteration]}, "runs/a")
    shown = " ".join(capsys.readouterr().out.split())
    assert "own images 0.600 ± 0.050, agreement with the exact check on held-out images 0.550 ± 0.100" in shown


def test_the_closing_table_compares_with_sft_and_control_in_100_columns():
    gain = {"gain_over_sft": 0.175, "gain_over_sft_stderr": 0.045, "gain_over_control": -0.0174}
    after = SCORE | gain | {"gain_over_control_stderr": 0.046, "margin": -50.37, "accuracy": 0.067}
    measured = {"after_sft": SCORE, "sft_on_winners": SCORE, "after_dpo": after, "after_online_dpo": after}
    table = closing_table({"iterations": [{"resolution": 512, "eval": measured}]})
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert cells["policy"] == ["after SFT", "control", "after DPO", "after online DPO"]
    assert cells["over SFT"] == ["-", "-", *["+0.175 ± 0.045"] * 2]
    assert cells["over control"] == ["-", "-", *["-0.017 ± 0.046"] * 2]
    console = Console(width=100)
    assert console.measure(table).minimum <= 100
