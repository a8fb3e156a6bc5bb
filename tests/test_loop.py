"""The whole loop as its user runs it: a command, real Ray and DeepSpeed, the smallest model, a few steps a stage."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from tests.tiny import tiny_checkpoint
from vargpt_rl.model.modeling import Vargpt

ROOT = Path(__file__).parents[1]
SMALL = """
resolutions=[32,48] sft.records=16 sft.recipe.steps=4 sft.recipe.batch=4 sft.recipe.micro_batch=2
pretrain.records=8 pretrain.recipe.steps=2 pretrain.recipe.batch=4 pretrain.recipe.micro_batch=2
understanding.records=8 understanding.questions=16 understanding.recipe.steps=2 understanding.recipe.batch=8
understanding.recipe.micro_batch=4 dpo.recipe.steps=3 dpo.recipe.batch=4 dpo.recipe.micro_batch=2
preference.count=8 evaluation.prompts=8 evaluation.questions=4 evaluation.grid=2 tracking.wandb=offline
learner.save_every=1 name=test
"""


def command(folder: Path, *overrides: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "vargpt_rl.loop",
        f"runs={folder}",
        f"checkpoint={folder}/model",
        *SMALL.split(),
        *overrides,
    ]


def run(folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(folder, *overrides), cwd=ROOT, capture_output=True, text=True, timeout=280)


def wait_for(condition, deadline: float = 200.0) -> None:
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, "the loop did not get there in time"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    tiny_checkpoint(folder / "model")
    return folder


@pytest.fixture(scope="module")
def finished(folder) -> Path:
    """A run whose driver was killed in the middle of its first SFT, then of its first DPO, and which the same command
    then completed.
    """
    directory = folder / "test"
    for stage in ("sft", "dpo"):
        with (folder / f"{stage}.log").open("w") as output:
            driver = subprocess.Popen(command(folder), cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
            saved = directory / f"checkpoints/iter-00-{stage}/trainer"
            try:
                wait_for(lambda: driver.poll() is not None or list(saved.glob("checkpoint-*")))  # noqa: B023
                assert driver.poll() is None, (folder / f"{stage}.log").read_text()[-3000:]
            finally:
                os.killpg(driver.pid, signal.SIGKILL)
                driver.wait()
    assert not (directory / "summary.json").exists()
    again = run(folder)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "going on after iter-00/control" in again.stdout
    return directory


@pytest.mark.timeout(600)
def test_a_killed_driver_goes_on_and_completes(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["status"] == "complete"
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


def test_a_killed_stage_goes_on_inside(finished):
    for stage, steps in (("sft", 4), ("dpo", 3)):
        lines = (finished / f"checkpoints/iter-00-{stage}/log.jsonl").read_text().splitlines()
        trained = [line["step"] for line in map(json.loads, lines) if "loss" in line]
        assert trained and trained == list(range(trained[0], steps + 1)) and trained[0] > 1, "by its last start"
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
    assert {"pretrain", "understanding", "sft", "sft_on_winners", "swap", "rollout"} <= {
        line["stage"] for line in lines
    }


def test_pictures_model_and_tracking_are_there(finished):
    assert (finished / "samples/iter-00.png").stat().st_size > 1000
    assert Vargpt.from_pretrained(finished / "model").config.model_type == "vargpt"
    assert list((finished / "wandb").glob("offline-run-*"))
    assert "WANDB_API_KEY" not in (finished / "config.yaml").read_text()


def test_a_finished_run_says_so_and_does_nothing(finished, folder):
    before = (finished / "summary.json").read_bytes()
    again = run(folder)
    assert again.returncode == 0 and "complete" in again.stdout
    assert (finished / "summary.json").read_bytes() == before


def test_other_settings_under_the_same_name_are_refused(finished, folder):
    refused = run(folder, "dpo.beta=0.5")
    assert refused.returncode == 2
    assert "dpo.beta: 0.1 -> 0.5" in refused.stderr


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
        ("data=captioned", "data.captions"),
    ],
)
def test_bad_input_is_one_line_that_names_it(folder, override, named):
    empty, other = folder / "EMPTY", folder / "OTHER"
    empty.mkdir(exist_ok=True)
    (empty / "prompts.txt").write_text("\n")
    other.mkdir(exist_ok=True)
    (other / "config.json").write_text('{"model_type": "llama"}')
    override = override.replace("EMPTY", str(empty)).replace("OTHER", str(other))
    refused = run(folder, "name=bad", override)
    assert refused.returncode == 2
    error = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and named in error[0]
    assert not (folder / "bad").exists() or not (folder / "bad" / "state.json").exists()
