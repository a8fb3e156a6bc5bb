"""Image-tokenizer training that is interrupted ends with the weights of one that was not, bit for bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from learners.checkpoints import last_checkpoint
from learners.config import LearnerConfig
from learners.jobs import TokenizerJob, save_request, training_checkpoints
from learners.tokenizer_job import STATE, train_image_tokenizer
from tests.helpers.tiny import V1_SIDES, Patches
from vargpt_rl.model.v1.image_tokenizer import PATIENCE
from vargpt_rl.storage.checkpoint import Policy, check_checkpoint

KEYS = ["red", "nothing", "#102030", "blue", "#f0e010"]
CUT = PATIENCE + 3
"""Steps before the interruption: v1 has replaced unused codes by then."""
STEPS = CUT + 4


class Interrupted(Exception):
    """Stands for the end of a process."""


def job_of(model: Path, side: int, output: Path) -> TokenizerJob:
    return TokenizerJob(
        start=Policy(str(model)),
        keys=KEYS,
        source=Patches(),
        side=side,
        steps=STEPS,
        batch=3,
        lr=1e-3,
        output=output,
        seed=0,
    )


def train(job: TokenizerJob, cut: int | None = None, save_every: int | None = None) -> tuple[dict, list[dict]]:
    """The result and the log; interrupted as step ``cut`` is logged."""
    lines: list[dict] = []

    def write(line: dict) -> None:
        lines.append(line)
        if line["step"] == cut:
            raise Interrupted

    return train_image_tokenizer(job, LearnerConfig(save_every=save_every), torch.float32, write), lines


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(check_checkpoint(output / "final"))


def resumed(job: TokenizerJob) -> TokenizerJob:
    """As a learner group resumes it."""
    return replace(job, resume=last_checkpoint(training_checkpoints(job.output))[0])


@pytest.fixture(params=["v1.1", "v1"])
def job(request, tmp_path) -> TokenizerJob:
    name, side = {"v1.1": ("checkpoint", 64), "v1": ("v1_checkpoint", 16 * V1_SIDES[-1])}[request.param]
    return job_of(request.getfixturevalue(name), side, tmp_path / "cut")


def test_it_resumes_from_its_last_checkpoint_bit_for_bit(job, tmp_path):
    whole = replace(job, output=tmp_path / "whole")
    expected, _ = train(whole)
    with pytest.raises(Interrupted):
        train(job, cut=CUT + 1, save_every=2)
    found = training_checkpoints(job.output)
    assert sorted(path.name for path in found.iterdir()) == [f"checkpoint-{CUT - 2:06d}", f"checkpoint-{CUT:06d}"]
    torch.manual_seed(1)
    result, lines = train(resumed(job))
    assert [line["step"] for line in lines] == list(range(CUT + 1, STEPS + 1))
    assert {**result, "seconds": 0} == {**expected, "seconds": 0}
    before, after = weights(whole.output), weights(job.output)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_damaged_checkpoint_is_not_used(checkpoint, tmp_path):
    job = job_of(checkpoint, 64, tmp_path / "cut")
    with pytest.raises(Interrupted):
        train(job, cut=5, save_every=2)
    path = training_checkpoints(job.output) / "checkpoint-000004" / STATE
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert resumed(job).resume == path.parent.with_name("checkpoint-000002")


def test_it_saves_on_request(checkpoint, tmp_path):
    job = job_of(checkpoint, 64, tmp_path)
    save_request(job.output).touch()
    with pytest.raises(Interrupted):
        train(job, cut=3)
    assert not save_request(job.output).exists()
    assert [path.name for path in training_checkpoints(job.output).iterdir()] == ["checkpoint-000001"]
