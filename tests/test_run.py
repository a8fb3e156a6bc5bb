"""The run directory: steps are done once, settings do not change under a run, the summary comes last."""

import json

import pytest

from vargpt_rl.run import Run, differences


def test_a_finished_step_is_not_repeated(tmp_path):
    calls = []

    def work() -> dict:
        calls.append(1)
        return {"value": 3}

    assert Run(tmp_path / "run", {}).step("one", work) == {"value": 3}
    assert Run(tmp_path / "run", {}).step("one", work) == {"value": 3}
    assert len(calls) == 1


def test_a_step_that_fails_is_not_recorded(tmp_path):
    run = Run(tmp_path / "run", {})
    with pytest.raises(ZeroDivisionError):
        run.step("one", lambda: 1 / 0)
    assert Run(tmp_path / "run", {}).state["steps"] == {}


def test_other_settings_are_refused_by_name(tmp_path):
    Run(tmp_path / "run", {"a": {"b": 1, "c": 2}})
    with pytest.raises(ValueError, match=r"a\.b: 1 -> 5"):
        Run(tmp_path / "run", {"a": {"b": 5, "c": 2}})


def test_differences_name_added_and_removed_keys():
    assert differences({"a": 1, "b": 2}, {"a": 1, "c": 3}) == ["b: 2 -> None", "c: None -> 3"]


def test_metrics_are_lines_with_their_place(tmp_path):
    run = Run(tmp_path / "run", {})
    run.where = {"iteration": 1, "resolution": 256}
    run.log("sft", 7, {"loss": 0.5})
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert line.pop("time") > 0
    assert line == {"iteration": 1, "resolution": 256, "stage": "sft", "step": 7, "loss": 0.5}


def test_a_run_without_summary_is_not_finished(tmp_path):
    run = Run(tmp_path / "run", {})
    assert run.summary is None
    run.finish({"status": "complete"})
    assert Run(tmp_path / "run", {}).summary == {"status": "complete"}


def test_time_between_runs_does_not_count(tmp_path):
    run = Run(tmp_path / "run", {})
    run.began -= 100
    run.save()
    assert 100 <= Run(tmp_path / "run", {}).seconds < 105
