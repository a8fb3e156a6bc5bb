"""The doctor: tables of a full-size plan without weights, verdicts, and faults in one line."""

import time

import pytest

from tests.tiny import tiny_checkpoint
from vargpt_rl import doctor
from vargpt_rl.memory import GIB


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return f"checkpoint={tiny_checkpoint(tmp_path_factory.mktemp('model'))}"


def test_the_full_size_model_is_planned_in_seconds(capsys):
    began = time.process_time()
    code = doctor.main(["experiment=vargpt_v1_1", "stage=dpo", "gpus=8", "gpu_memory_gib=80"])
    assert time.process_time() - began < 40
    printed = capsys.readouterr().out
    assert code == 0 and "the run fits into 8 GPUs of 80.0 GiB" in printed
    rows = [line.split() for line in printed.splitlines() if line.split()[:1] == ["dpo"]]
    assert [row[1] for row in rows] == ["256", "512"]
    assert all(float(row[4]) == pytest.approx(10.629e9 * 2 / 4 / GIB, 0.01) for row in rows), "a quarter of the weights"
    assert "pretrain" not in printed and "torch 2." in printed


def test_what_does_not_fit_is_said_with_the_sum(checkpoint, capsys):
    small = [checkpoint, "resolutions=[32]", "iterations=1", "stages=[align]"]
    assert doctor.main([*small, "gpus=4", "gpu_memory_gib=1"]) == 1
    assert "which has 1.0 GiB: 1 learner rank of" in capsys.readouterr().out
    assert doctor.main([*small, "gpus=2", "gpu_memory_gib=80"]) == 1
    assert "need 4 GPUs in placement=split" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("experiment=other", "vargpt_v1_1"),
        ("stage=sleep", "pretrain, understanding, sft, dpo"),
        ("gpus=0", "gpus=0"),
        ("gpus=many", "gpus=many"),
        ("gpu_memory_gib=-1", "gpu_memory_gib=-1"),
        ("checkpoint=nowhere", "checkpoint=nowhere"),
        ("sft.recipe.zer=3", "zer"),
        ("stages=[tokenizer]", "stages=['tokenizer']"),
    ],
)
def test_faults_are_one_line_that_names_the_key(checkpoint, argument, named, capsys):
    start = [] if argument.startswith(("checkpoint", "experiment")) else [checkpoint]
    assert doctor.main([*start, "resolutions=[32]", argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and named in error and error.count("\n") == 1
