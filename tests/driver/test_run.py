"""The run directory: steps are done once, settings do not change under a run, the summary comes last."""

import json
import math
import subprocess

import pandas as pd
import pytest
import wandb
from PIL import Image

from configs.schema import LoopConfig
from vargpt_rl.common.settings import kind_at
from vargpt_rl.driver.run import FREE, Run, differences


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


def test_settings_that_change_nothing_of_the_outcome_may_change_and_are_noted(tmp_path):
    before = {"rollout": {"workers": 2, "reply": "template"}, "learner": {"max_restarts": 3}}
    after = {"rollout": {"workers": 1, "reply": "template"}, "learner": {"max_restarts": 9}}
    Run(tmp_path / "run", before)
    run = Run(tmp_path / "run", after)
    said = "resuming with other settings: learner.max_restarts: 3 -> 9; rollout.workers: 2 -> 1"
    assert run.state["events"] == [said]
    assert Run(tmp_path / "run", after).state["events"] == [said], "once"
    with pytest.raises(ValueError, match=r"\(rollout.reply: template -> generate\)"):
        Run(tmp_path / "run", before | {"rollout": {"workers": 2, "reply": "generate"}})


def test_a_run_that_was_moved_is_not_worth_a_note(tmp_path):
    Run(tmp_path / "run", {"name": None, "runs": "runs"})
    assert Run(tmp_path / "run", {"name": "run", "runs": str(tmp_path)}).state["events"] == []


def test_ranks_may_change_and_what_is_lost_is_noted(tmp_path):
    before = {"learner": {"ranks": 2}, "dpo": {"recipe": {"micro_batch": 4, "zero": 2, "lr": 0.1}}, "at": {}}
    after = {"learner": {"ranks": 1}, "dpo": {"recipe": {"micro_batch": 2, "zero": 3, "lr": 0.1}}, "at": {}}
    Run(tmp_path / "run", before)
    changed, lost = Run(tmp_path / "run", after).state["events"]
    assert changed.endswith("dpo.recipe.micro_batch: 4 -> 2; dpo.recipe.zero: 2 -> 3; learner.ranks: 2 -> 1")
    assert lost.startswith("training is rounded in another order from now on")
    with pytest.raises(ValueError, match=r"\(dpo.recipe.lr: 0.1 -> 0.2\)"):
        Run(tmp_path / "run", {**after, "dpo": {"recipe": {"micro_batch": 2, "zero": 3, "lr": 0.2}}})


def test_every_setting_that_may_change_is_one():
    for key in (each.removesuffix(": ") for each in FREE):
        kind_at(LoopConfig, key.split("."))  # ValueError for another


def test_differences_name_added_and_removed_keys():
    assert differences({"a": 1, "b": 2}, {"a": 1, "c": 3}) == ["b: 2 -> None", "c: None -> 3"]


def test_metrics_are_lines_with_their_place(tmp_path):
    run = Run(tmp_path / "run", {})
    run.log("sft", 7, {"loss": 0.5}, {"iteration": 1, "resolution": 256})
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert line.pop("time") > 0
    assert line == {"iteration": 1, "resolution": 256, "stage": "sft", "step": 7, "loss": 0.5}


class Tracker:
    """Stands in for wandb's run: remembers what it is given."""

    def __init__(self):
        self.lines = []

    def log(self, line):
        self.lines.append(line)


def test_numbers_by_scale_reach_wandb_with_their_place_and_lists_do_not(tmp_path):
    run = Run(tmp_path / "run", {})
    labels = {"iteration": 1, "resolution": 256}
    run.tracker = Tracker()
    run.log("dpo", 1, {"rewards/margins/scale_0": 0.5, "rewards/margins": 0.75, "counts": [1, 2]}, labels)
    assert run.tracker.lines == [
        {"dpo/rewards/margins/scale_0": 0.5, "dpo/rewards/margins": 0.75, "iteration": 1, "resolution": 256}
    ]
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text())["counts"] == [1, 2]


def test_a_table_has_images_and_no_nan(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    run = Run(tmp_path / "run", {})
    table = pd.DataFrame({"prompt": ["x", "y"], "image": [tmp_path / "a.png"] * 2, "reward": [0.5, math.nan]})
    run.log_table("pairs/table", table, {})  # without wandb there is nothing to do
    run.tracker = Tracker()
    run.log_table("pairs/table", table, {})
    shown = run.tracker.lines[0]["pairs/table"]
    assert shown.columns == ["prompt", "image", "reward"]
    assert [(row[0], row[2]) for row in shown.data] == [("x", 0.5), ("y", None)]
    assert all(isinstance(row[1], wandb.Image) for row in shown.data)


def test_wandbs_files_stay_in_the_run_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", "unset")
    monkeypatch.delenv("WANDB_DATA_DIR")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    run = Run(tmp_path / "run", {})
    run.track("offline", "test", {})
    run.log_table("pairs/table", pd.DataFrame({"image": [tmp_path / "a.png"]}), {})
    (tmp_path / "a.png").unlink()
    run.close(failed=False)
    staged = [path.read_bytes()[:4] for path in (tmp_path / "run/wandb/artifacts/staging").iterdir()]
    assert b"\x89PNG" in staged


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


def test_secrets_of_the_environment_are_in_no_file_of_a_run_nor_in_wandbs(tmp_path, monkeypatch):
    secrets = {"WANDB_API_KEY": "5ec4e7" * 6 + "abcd", "HF_TOKEN": "hf_" + "NotSeen" * 5, "REWARD_TOKEN": "not-seen"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    for command in (["init", "-q"], ["remote", "add", "origin", "https://me:pass-not-seen@localhost/code"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    run = Run(tmp_path / "run", {"a": 1})
    run.track("offline", "test", {"a": 1})
    run.log("sft", 1, {"loss": 0.5}, {})
    run.finish({})
    run.close(failed=False)
    written = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert any(path.suffix == ".wandb" for path in written) and any(path.name == "debug.log" for path in written)
    for path, text in written.items():
        assert not [value for value in [*secrets.values(), "pass-not-seen"] if value.encode() in text], path


def test_what_a_killed_driver_left_half_written_goes(tmp_path):
    Run(tmp_path / "run", {})
    for name in ("config.yaml", "state.json", "summary.json"):
        (tmp_path / "run" / f".{name}.4711").write_text("{")
    run = Run(tmp_path / "run", {})
    assert run.summary is None and not list(run.directory.glob(".*"))


def test_a_torn_last_line_of_metrics_goes(tmp_path):
    run = Run(tmp_path / "run", {})
    run.log("sft", 1, {"loss": 0.5}, {})
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"time": 17')
    Run(tmp_path / "run", {}).log("sft", 2, {"loss": 0.25}, {})
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_going_back_forgets_a_step_and_all_after_it_and_says_why(tmp_path):
    run = Run(tmp_path / "run", {})
    for version, name in enumerate(["one", "two", "three"]):
        run.served = {"version": version, "weights": [name]}
        run.step(name, dict)
    run.rewind("two", "its file is damaged")
    for each in (run, Run(tmp_path / "run", {})):
        assert list(each.state["steps"]) == list(each.state["served"]) == ["one"]
        assert each.served == {"version": 0, "weights": ["one"]}
        assert each.state["events"] == ["redoing two: its file is damaged"]
