"""Remarks on curves, intervals of skills, verdicts of iterations."""

import pytest

from tests.helpers.run_folder import make_run, metrics
from vargpt_rl.page.contents import read_run
from vargpt_rl.page.curves import all_curves, flags
from vargpt_rl.page.images import galleries, skill_tables, verdicts
from vargpt_rl.page.sections import duration, flatten, head


def series(stage):
    return [line for line in metrics() if line["stage"] == stage and line["iteration"] == 0]


def test_saturated_pairs_and_falling_likelihood_are_remarked_on():
    found = flags(series("dpo"))
    assert "told apart from step 3 of 20 on" in found[0] and "less likely, by 19 nats" in found[1]
    assert "20% of the time is spent waiting for data" in flags(series("sft"))[0]
    assert "in 60% of the groups" in flags(series("grpo/rollout"))[0]


def test_a_healthy_stage_has_no_remarks():
    lines = [{"step": step, "loss": 1 / step, "rewards/accuracies": 0.7, "logps/chosen": step} for step in range(1, 9)]
    assert flags(lines) == [] and flags([]) == []


def test_a_loss_that_is_no_number_is_remarked_on():
    assert "not a number" in flags([{"step": 1, "loss": float("nan")}])[0]


def test_curves_of_each_stage_are_drawn_with_a_text_beside_them(tmp_path):
    found = all_curves([read_run(make_run(tmp_path / "run", done=30))])
    places = [stage.title for stage in found]
    assert places[:3] == [f"iteration 0: {stage}, 64 px" for stage in ("SFT", "DPO", "GRPO: own images")]
    titles = [plot.title for plot in found[1].plots]
    assert "margin by scale" in titles and "log-probability since the first step" in titles
    likely = next(plot for plot in found[1].plots if plot.title.startswith("log-prob"))
    assert likely.figure["data"][0]["y"][0] == 0 and "chosen 0 to -19" in likely.text


def test_a_step_that_was_redone_counts_once(tmp_path):
    run = read_run(make_run(tmp_path / "run", done=30))
    again = next(line for line in run.metrics if line["stage"] == "dpo" and line["iteration"] == 0)
    run.metrics.append(again | {"loss": 9.0})
    assert len(run.series(0, "dpo")) == 20 and run.series(0, "dpo")[0]["loss"] == 9.0


def test_skills_have_intervals_and_counts(tmp_path):
    table = skill_tables([read_run(make_run(tmp_path / "run", prompts=12))])[0]
    assert table.title == "iteration 0, 64 px" and table.columns == ["SFT", "control", "DPO", "GRPO"]
    (title, every), *by_skill = table.rows
    assert title == "all (= training reward)", "here the score is the very reward"
    assert every[0].n == 12 and every[0].low < every[0].mean < every[0].high
    assert sum(cells[0].n for _, cells in by_skill) == 12


def test_a_reward_other_than_the_score_has_a_row_of_its_own(tmp_path):
    run = read_run(make_run(tmp_path / "run", prompts=12))
    path = run.folder / "evaluations/iter-00-after_dpo.jsonl"
    path.write_text(path.read_text().replace('"reward": 1.0', '"reward": 0.25'))
    titles = [title for title, _ in skill_tables([run])[0].rows]
    assert titles[0] == "all" and titles[-1] == "training reward"


def test_the_last_sentence_of_an_iteration_is_the_last_policy_against_sft(tmp_path):
    found = verdicts([read_run(make_run(tmp_path / "run"))])
    assert list(found) == ["iteration 0, 64 px", "iteration 1, 128 px"]
    assert found["iteration 0, 64 px"][-1].startswith("GRPO against SFT on the same 8 images")
    assert len(found["iteration 0, 64 px"]) == 5


@pytest.mark.parametrize("settings", [{"align": {"sft": False}}, {"at": {"64": {"align": {"sft": False}}}}])
def test_a_run_without_sft_begins_at_its_start(tmp_path, settings):
    run = read_run(make_run(tmp_path / "run"))
    run.config["align"] |= settings.pop("align", {})
    run.config |= settings
    assert skill_tables([run])[0].columns == ["start", "control", "DPO", "GRPO"]
    assert verdicts([run])["iteration 0, 64 px"][-1].startswith("GRPO against the start on the same 8 images")


def test_sizes_are_never_compared(tmp_path):
    runs = [read_run(make_run(tmp_path / name)) for name in ("a", "b")]
    runs[1].config["resolutions"] = [128, 256]
    assert not [place for place in verdicts(runs) if "against" in place]
    assert len(galleries(runs)) == 4, "no gallery mixes two resolutions"
    for run in runs:
        del run.config["resolutions"]
    assert not [place for place in verdicts(runs) if "against" in place], "nor are unknown ones"
    assert len(galleries(runs)) == 4


def test_curves_of_two_sizes_are_not_drawn_over_each_other(tmp_path):
    runs = [read_run(make_run(tmp_path / name, done=30)) for name in ("a", "b")]
    for entry in runs[1].metrics:
        entry["resolution"] = 256
    found = {stage.title: stage for stage in all_curves(runs)}
    for size, name in ((64, "a"), (256, "b")):
        (rewards, *_) = found[f"iteration 0: GRPO: own images, {size} px"].plots
        assert {trace["name"] for trace in rewards.figure["data"]} == {f"{name}: reward", f"{name}: diversity"}
    runs[1].metrics = runs[0].metrics
    (rewards, *_) = all_curves(runs)[2].plots
    assert len(rewards.figure["data"]) == 4, "those of one size are"


def test_time_left_is_that_of_steps_of_the_same_name(tmp_path):
    run = read_run(make_run(tmp_path / "run", done=30))
    assert head(run).left is None, "it does not run"
    run.status = "running"
    assert head(run).left == 4.0 * len(run.ahead)
    assert [mark.state for mark in head(run).strip[29:32]] == ["done", "now", "ahead"]


def test_durations_and_settings_are_written_for_people():
    assert [duration(value) for value in (42, 425, 12000)] == ["42 s", "7 min 5 s", "3 h 20 min"]
    assert flatten({"a": {"b": [1], "c": {}}, "d": None}) == {"a.b": "[1]", "a.c": "{}", "d": "null"}


def test_a_loss_that_is_zero_by_construction_is_not_plotted(tmp_path):
    run = read_run(make_run(tmp_path / "run", done=4))
    lines = [{"loss": sign * 1e-9, "entropy": 0.1, "kl": 0.01} for sign in (1, -1)]
    run.metrics = [{"time": 1.0, "iteration": 0, "stage": "grpo", "step": k, **line} for k, line in enumerate(lines)]
    titles = [plot.title for plot in all_curves([run])[0].plots]
    assert titles == ["entropy of the policy", "KL divergence from the reference"]
