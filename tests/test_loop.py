"""The whole loop as its user runs it: a command, real Ray and DeepSpeed, the smallest model, a few steps a stage."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from tests.helpers.driver import stage_context
from tests.helpers.faults import ask
from tests.helpers.forks import run_loop
from tests.helpers.tiny import tiny_checkpoint
from vargpt_rl import loop
from vargpt_rl.common.failpoints import VARIABLE
from vargpt_rl.common.signals import Stop
from vargpt_rl.driver.session import StageContext, Step
from vargpt_rl.evaluate.grid import CAPTION, CELL, LABEL
from vargpt_rl.loop import align, execute
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.prompt import REPLY
from vargpt_rl.stages import ALIGN, RUN_STAGES, STAGES, UNREACHED, freeze
from vargpt_rl.storage.checkpoint import Policy, load_weights_into

ROOT = Path(__file__).parents[1]
SMALL = """
stages=[pretrain,understanding,align,edit] tokenizer.steps=2 tokenizer.images=8
edit.records=8 edit.recipe.steps=2 edit.recipe.batch=4 edit.recipe.micro_batch=2 evaluation.edits=4
resolutions=[32,48] sft.records=16 sft.recipe.steps=4 sft.recipe.batch=4 sft.recipe.micro_batch=2
pretrain.records=8 pretrain.recipe.steps=2 pretrain.recipe.batch=4 pretrain.recipe.micro_batch=2
understanding.records=8 understanding.questions=16 understanding.recipe.steps=2 understanding.recipe.batch=8
understanding.recipe.micro_batch=4 dpo.recipe.steps=3 dpo.recipe.batch=4 dpo.recipe.micro_batch=2
preference.count=8 evaluation.prompts=8 evaluation.questions=4 evaluation.grid=2 tracking.wandb=offline
align.methods=[dpo] reward.path=null
rollout.reply=generate rollout.reply_tokens=4 rollout.text_engine=transformers learner.save_every=1 name=test
"""
OVERLAPPED = "+at.48.dpo.min_pairs=4"
"""Half of the pairs of the second iteration are made beside its DPO."""


TRAINED = ["iter-00-sft", "iter-00-dpo", "iter-01-sft", "iter-01-dpo"]
MEASURED = {
    "tokenizer": {"overall", "overall_low", "overall_high", "n"},
    "pretrain": {"overall", "overall_low", "overall_high", "n"},
    "understanding": {"accuracy", "accuracy_low", "accuracy_high", "n"},
    "edit": {"overall", "overall_low", "overall_high", "n", "done", "kept"},
}


def test_what_ends_a_run_is_in_its_log(tmp_path, monkeypatch):
    context = stage_context(tmp_path, "name=failed")
    monkeypatch.setattr(loop, "prepare", lambda arguments: (context.config, context.inputs, context.run))

    def fail(run: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(loop, "resume", fail)
    with pytest.raises(RuntimeError, match="no luck"):
        loop.start([])
    monkeypatch.setattr(loop, "resume", lambda run: sys.exit(75))
    with pytest.raises(SystemExit):
        loop.start([])
    log = (context.run.directory / "run.log").read_text()
    assert "Traceback" in log and "RuntimeError: no luck" in log and "stopping with exit code 75; to resume: " in log


@pytest.mark.parametrize(
    ("outcome", "code"), [(RuntimeError("made of an exit"), 75), (SystemExit(1), 75), (2, 75), (1, 75), (0, 0)]
)
def test_a_stop_whose_exit_a_library_caught_has_its_own_code(monkeypatch, outcome, code):
    def start(arguments: list[str]) -> int:
        monkeypatch.setattr(Stop, "code", 75)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(Stop, "code", None)
    monkeypatch.setattr(loop, "start", start)
    assert loop.main([]) == code


def arguments(folder: Path, *overrides: str) -> list[str]:
    return [f"runs={folder}", f"checkpoint={folder}/model", *SMALL.split(), *overrides]


def command(folder: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "vargpt_rl.loop", *arguments(folder, *overrides)]


def main(folder: Path, *overrides: str) -> int:
    """The exit code, in this process: for commands that start no cluster."""
    return loop.main(arguments(folder, *overrides))


def kill_where_it_hangs(folder: Path, fault: str, *overrides: str) -> None:
    """Kill a run, driver and cluster, when one of its processes has come to the fail point ``fault``."""
    asked, log = ask(folder / "faults", fault, "hang"), folder / "killed.log"
    environment = os.environ | {VARIABLE: str(folder / "faults")}
    with log.open("w") as output:
        driver = subprocess.Popen(
            command(folder, *overrides), cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    end = time.monotonic() + 280
    try:
        while asked.exists():
            assert driver.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.1)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    tiny_checkpoint(folder / "model")
    return folder


@pytest.fixture(scope="module")
def finished(folder) -> Path:
    """A run that was killed in the middle of its first DPO, and which the same command then completed."""
    directory = folder / "test"
    kill_where_it_hangs(folder, "iter-00-dpo/rank-0/step-2", OVERLAPPED)
    assert not (directory / "summary.json").exists()
    wide = os.environ | {"COLUMNS": "120"}  # GNU readline, which pytest imports, exports its own to child processes
    again = subprocess.run(command(folder, OVERLAPPED), cwd=ROOT, env=wide, capture_output=True, text=True, timeout=280)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resuming after iter-00/pair" in again.stdout
    (folder / "printed.txt").write_text(again.stdout)
    return directory


@pytest.mark.timeout(600)
def test_a_killed_driver_goes_on_and_completes(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert summary["events"] == ["resuming after iter-00/pair"]
    assert [iteration["resolution"] for iteration in summary["iterations"]] == [32, 48]
    for iteration in summary["iterations"]:
        assert iteration["pairs"]["built"] + iteration["pairs"]["dropped"] == 8
        assert iteration["rollout"]["checkpoints"][0].endswith("final")
        assert len(iteration["rollout"]["checkpoints"]) == 2
        assert iteration["dpo"]["step0_max_abs_logratio"] <= 1e-4
        assert iteration["dpo"]["loss_first"] == pytest.approx(0.6931, abs=1e-3)
        assert iteration["swap"]["verified"] and iteration["swap"]["bytes"] > 0
        assert set(iteration["eval"]) == {"after_sft", "after_dpo", "sft_on_winners"}
    versions = [iteration["swap"]["version"] for iteration in summary["iterations"]]
    assert versions == sorted(set(versions)), "versions only grow, also across a restart"
    assert summary["understanding"]["before"] == summary["understanding"]["after"]


def test_every_stage_is_measured_on_held_out_data(finished):
    stages = json.loads((finished / "summary.json").read_text())["stages"]
    assert {name: stage["resolution"] for name, stage in stages.items()} == {
        "pretrain": 32, "understanding": 32, "edit": 48
    }  # fmt: skip
    for name, stage in stages.items():
        assert MEASURED[name] <= stage["eval"].keys(), name
    assert MEASURED["edit"] <= stages["edit"]["before"].keys()
    assert (
        stages["understanding"]["eval"]
        == json.loads((finished / "summary.json").read_text())["understanding"]["before"]
    )
    logged = [json.loads(line)["stage"] for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert {f"evaluate/{name}" for name in stages} <= set(logged)


def test_editing_changes_exactly_the_parameters_it_names(finished, folder):
    model, edited = Vargpt.from_pretrained(folder / "model"), Vargpt.from_pretrained(finished / "model")
    sets = ["pretrain", "understanding", *TRAINED]
    load_weights_into(model, [finished / "checkpoints" / name / "final" for name in sets])
    before, after = model.state_dict(), edited.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    named = set(freeze(model, STAGES["edit"]))
    summary = json.loads((finished / "summary.json").read_text())["stages"]["edit"]
    assert summary["frozen"] == [UNREACHED, "image_tokenizer"] and summary["trained_tensors"] == len(named)
    # Two steps may not drop a single condition, and then nothing asks for the unconditional rows.
    assert named - {"image_decoder.condition.unconditional"} <= changed <= named


def test_edits_are_shown_in_a_grid(finished):
    columns, rows = 2, 4
    with Image.open(finished / "samples/edit.png") as grid:
        assert grid.size == (LABEL + CELL * columns, CAPTION + CELL * rows)


def test_edits_before_and_after_are_in_the_last_table(finished, folder):
    assert "edit 48 px: 2 steps of 4 = 2 (micro) x 1 (accumulation) x 2 (ranks)" in (finished / "run.log").read_text()
    table = [line for line in (folder / "printed.txt").read_text().splitlines() if line.startswith("│ edit")]
    assert len(table) == 1 and table[0].count(" to ") == 2


def alone(folder: Path, name: str, *settings: str, points: tuple[str, ...] = ("end",)) -> list[list]:
    """Starts of a run in one process: point, exit code, and whether the point was missed."""
    given = arguments(folder, f"name={name}", "rollout.workers=1", "learner.ranks=1", *settings)
    return [end[:3] for end in run_loop(given, *points, faults=folder / "faults", log=folder / f"{name}.log")]


def test_stages_run_without_the_others_from_a_checkpoint(finished, folder):
    settings = ["stages=[tokenizer,edit]", f"checkpoint={finished}/model", "resolutions=[48]"]
    assert alone(folder, "alone", *settings) == [["end", 0, False]], (folder / "alone.log").read_text()[-3000:]
    summary = json.loads((folder / "alone/summary.json").read_text())
    assert list(summary["stages"]) == ["tokenizer", "edit"] and not summary["iterations"]
    assert MEASURED["tokenizer"] <= summary["stages"]["tokenizer"]["eval"].keys()
    assert summary["stages"]["edit"]["swap"]["verified"]


def test_dpo_overlaps_the_making_of_its_pairs(folder):
    """Killed when the first of two parts is there; with a cluster: the second iteration of `finished`."""
    settings = ["stages=[align]", "iterations=1", "resolutions=[32]", "dpo.min_pairs=4", "at.256.dpo.recipe.batch=4"]
    settings += ["dpo.control=false", "rollout.reply=template"]
    directory, second = folder / "overlap", "part-00001.parquet/written"
    first = directory / "preferences/iter-00/part-00000.parquet"
    ends = alone(folder, "overlap", *settings, points=(second,))
    assert ends == [[second, -signal.SIGKILL, False]] and first.exists()
    assert alone(folder, "overlap", *settings) == [["end", 0, False]], (folder / "overlap.log").read_text()[-3000:]
    (iteration,) = json.loads((directory / "summary.json").read_text())["iterations"]
    assert iteration["pairs"]["parts"] == [4, 4] and iteration["pairs"]["built"] == 8
    assert iteration["dpo"]["step0_max_abs_logratio"] <= 1e-4 and iteration["dpo"]["steps"] == 3
    table = pd.read_parquet(directory / "preferences/iter-00.parquet")
    assert len(table) == 8 and table.pair_id.is_unique and not first.parent.exists()
    assert_first_step_takes_the_first_part(directory / "checkpoints/iter-00-dpo", table)


def assert_first_step_takes_the_first_part(trained: Path, table: pd.DataFrame) -> None:
    steps = [json.loads(line) for line in (trained / "order.jsonl").read_text().splitlines()]
    assert set(steps[0]["pairs"]) == set(table.pair_id[:4])
    assert {name for step in steps for name in step["pairs"]} == set(table.pair_id)


def test_dpo_overlaps_the_making_of_its_pairs_in_a_cluster(finished):
    iteration = json.loads((finished / "summary.json").read_text())["iterations"][1]
    assert iteration["pairs"]["parts"] == [4, 4]
    table = pd.read_parquet(finished / "preferences/iter-01.parquet")
    assert_first_step_takes_the_first_part(finished / "checkpoints/iter-01-dpo", table)


@pytest.mark.parametrize("stages", [s for n in (1, 2, 5) for s in combinations(RUN_STAGES, n)], ids="+".join)
def test_stages_run_in_order_each_from_the_last_policy(stages, tmp_path, monkeypatch):
    asked, exported = [], []

    def record(self, step, work, *args):
        """Stand in for the steps: note each, with the policy that it is given."""
        policy = next((arg for arg in args if isinstance(arg, Policy)), Policy(""))
        asked.append((self.name, step, self.resolution, tuple(path.parent.name for path in policy.weights)))
        return {"accuracy": 0.5}

    monkeypatch.setattr(StageContext, "step", record)
    monkeypatch.setattr(loop, "export_model", lambda policy, target, files: exported.append(policy.weights))
    settings = [f"stages=[{','.join(stages)}]", "resolutions=[32,48]", "iterations=2", "dpo.control=false"]
    summary = execute(stage_context(tmp_path, *settings).session)
    keys = [key for s in stages for key in (TRAINED if s == ALIGN else [s])]
    assert [path.parent.name for path in exported[0]] == keys
    assert list(summary["stages"]) == [stage for stage in stages if stage != ALIGN]
    assert len(summary["iterations"]) == (2 if ALIGN in stages else 0)
    for stage in summary["stages"]:
        at = 48 if stage == "edit" else 32
        before, after = tuple(keys[: keys.index(stage)]), tuple(keys[: keys.index(stage) + 1])
        assert {(stage, "", at, before), (stage, "swap", at, after), (stage, "eval", at, after)} <= set(asked)
    steps = [(name, step) for name, step, *_ in asked]
    assert (("edit", "before") in steps) == ("edit" in stages) == (("edit", "grid") in steps)
    answered = [step for name, step in steps if name == "understands"]
    assert answered == (["before"] * ("understanding" not in stages) + ["after"]) * (ALIGN in stages)


@pytest.mark.parametrize("control", [True, False])
def test_an_iteration_goes_through_its_steps_in_order(control, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(StageContext, "step", lambda self, step, work, *args: asked.append(step) or {})
    context = stage_context(tmp_path, f"dpo.control={str(control).lower()}")
    align(context, Policy(""))
    skipped = {Step.REWARD, Step.ENCODE, Step.PROPOSE} | (
        set() if control else {step for step in Step if "control" in step}
    )
    assert asked == [step for step in Step if step not in skipped]


def test_methods_follow_each_other(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(StageContext, "step", lambda self, step, work, *args: asked.append(step) or {})
    settings = ["align.methods=[rft,grpo]", "reward.path=rewards.shapes:shapes_reward"]
    policy, results = align(stage_context(tmp_path, *settings), Policy(""))
    assert asked[4:-1] == ["rft", "rft_swap", "after_rft", "grpo", "grpo_swap", "after_grpo"]
    assert [path.parent.name for path in policy.weights] == ["iter-00-sft", "iter-00-rft", "iter-00-grpo"]
    assert list(results["eval"]) == ["after_sft", "after_rft", "after_grpo"]


def test_a_learned_reward_precedes_the_methods_that_use_it(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(StageContext, "step", lambda self, step, work, *args: asked.append(step) or {})
    policy, results = loop.align(stage_context(tmp_path, "align.methods=[reward,grpo]"), Policy(""))
    assert asked[4:-1] == ["sample", "judge", "pair", "reward", "grpo", "grpo_swap", "after_grpo"]
    assert [path.parent.name for path in policy.weights] == ["iter-00-sft", "iter-00-grpo"], "no reward in the policy"
    assert {"rollout", "pairs", "learned_reward"} <= results.keys()
    assert list(results["eval"]) == ["after_sft", "after_grpo"]


def test_a_killed_stage_resumes_inside(finished):
    lines = (finished / "checkpoints/iter-00-dpo/log.jsonl").read_text().splitlines()
    trained = [line["step"] for line in map(json.loads, lines) if "loss" in line]
    assert trained and trained == list(range(trained[0], 4)) and trained[0] > 1, "by its last start"
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["iterations"][0]["dpo"]["steps"] == 3
    assert not list(finished.glob("checkpoints/*/trainer")), "nothing is kept of what is done"


def test_every_pair_is_in_its_table_once(finished):
    for k in range(2):
        table = pd.read_parquet(finished / f"preferences/iter-{k:02d}.parquet")
        assert len(table) == 8 and table.pair_id.is_unique and table.prompt_id.is_unique
        assert set(table.rejected_source) == {f"iter-{k:02d}-sft/final", f"iter-{k:02d}-sft/step-000002"}


def test_metrics_have_trls_names_and_say_where_they_are_from(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert all({"time", "iteration", "resolution", "stage", "step"} <= line.keys() for line in lines)
    dpo = [line for line in lines if line["stage"] == "dpo" and line["iteration"] == 1]
    assert [line["step"] for line in dpo] == [1, 2, 3]
    names = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"}
    assert names | {"rewards/margins/scale_0", "bit_accuracy/chosen/scale_1"} <= dpo[0].keys()
    assert {"pretrain", "understanding", "sft", "sft_on_winners", "swap", "rollout", "pairs"} <= {
        line["stage"] for line in lines
    }


def test_prompts_to_which_the_model_begins_no_image_get_the_customary_words(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    replies = [line for line in lines if line["stage"] == "reply"]
    assert replies and all(line["template"] > 0 for line in replies), "random weights rarely begin one"
    tables = [pd.read_parquet(path) for path in (finished / "preferences").glob("*.parquet")]
    assert REPLY in set(pd.concat(tables).reply)


def test_images_model_and_tracking_are_there(finished):
    for name in ("iter-00.png",):
        assert (finished / "samples" / name).stat().st_size > 1000
    assert Vargpt.from_pretrained(finished / "model").config.model_type == "vargpt"
    assert list((finished / "wandb").glob("offline-run-*/files/media/table/pairs/table_*.json"))
    assert list((finished / "wandb/artifacts/staging").iterdir())
    assert {path.suffix for path in (finished / "samples").iterdir()} == {".png"}
    assert "WANDB_API_KEY" not in (finished / "config.yaml").read_text()


def test_the_best_policy_is_kept_beside_the_last(finished):
    summary = json.loads((finished / "summary.json").read_text())
    scores = [iteration["eval"]["after_dpo"]["overall"] for iteration in summary["iterations"]]
    names = {path.name for path in (finished / "model").iterdir()}
    kept = []
    for k, size in enumerate([32, 48]):
        note = json.loads((finished / f"best/{size}/best.json").read_text())
        assert note == {"metric": "after_dpo.overall", "value": scores[k], "iteration": k, "resolution": size}
        kept.append({"path": f"best/{size}", **note})
        found = {path.name for path in (finished / f"best/{size}").iterdir()}
        assert found | {"samples.png"} == names | {"best.json"}  # no grid is there before the first iteration's end
        assert Vargpt.from_pretrained(finished / f"best/{size}").config.model_type == "vargpt"
    assert summary["best"] == kept


def test_a_finished_run_says_so_and_does_nothing(finished, folder, capsys):
    before = (finished / "summary.json").read_bytes()
    assert main(folder, OVERLAPPED) == 0 and "complete" in capsys.readouterr().out
    assert (finished / "summary.json").read_bytes() == before


def test_other_settings_under_the_same_name_are_refused(finished, folder, capsys):
    assert main(folder, OVERLAPPED, "dpo.beta=0.5") == 2
    assert "dpo.beta: 0.1 -> 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("dpo.bta=1", "bta"),
        ("stages=[sleep]", "sleep"),
        ("iterations=1", "iterations=1"),
        ("resolutions=[32,50]", "50"),
        ("checkpoint=EMPTY", "config.json"),
        ("checkpoint=OTHER", "llama"),
        ("preference.prompts=EMPTY/prompts.txt", "prompts.txt"),
        ("reward.path=nowhere.py:reward", "nowhere.py"),
        ("dpo.recipe.batch=5", "dpo.recipe"),
        ("data=captioned stages=[align]", "data.captions"),
    ],
)
def test_bad_input_is_one_line_that_names_it(folder, override, named, capsys):
    empty, other = folder / "EMPTY", folder / "OTHER"
    empty.mkdir(exist_ok=True)
    (empty / "prompts.txt").write_text("\n")
    other.mkdir(exist_ok=True)
    (other / "config.json").write_text('{"model_type": "llama"}')
    override = override.replace("EMPTY", str(empty)).replace("OTHER", str(other))
    assert main(folder, "name=bad", *override.split()) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and named in error[0]
    assert not (folder / "bad").exists() or not (folder / "bad" / "state.json").exists()
