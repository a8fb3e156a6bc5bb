"""The closing table of online methods."""

from vargpt_rl.driver.report import method_table

RESULT = {
    "reward_first": 0.5,
    "reward_last": 0.75,
    "diversity_first": 0.2,
    "diversity_last": 0.1,
    "seconds_per_update": {"draw": 1.0, "judge": 2.0, "learn": 3.0, "swap": 0.5},
}
SCORE = {"overall": 0.7, "overall_stderr": 0.04}


def test_online_methods_show_their_figures_and_their_time():
    iteration = {"resolution": 256, "grpo": RESULT, "eval": {"after_grpo": SCORE, "sft_on_winners": None}}
    table = method_table([iteration])
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert cells["method"] == ["GRPO"] and cells["score"] == ["0.700 ± 0.040"] and cells["control"] == ["-"]
    assert (
        cells["reward"] == ["0.500 -> 0.750"] and cells["judge"] == ["-"] and cells["diversity"] == ["0.200 -> 0.100"]
    )
    assert [cells[f"{part} s"] for part in ("draw", "judge", "learn", "swap")] == [["1.0"], ["2.0"], ["3.0"], ["0.5"]]
