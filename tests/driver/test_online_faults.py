"""Faults inside an update of an online method, with a real cluster: training continues and ends in the same weights."""

import json
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.driver.test_faults import Ran
from tests.helpers.faults import ask
from tests.helpers.tiny import tiny_checkpoint
from vargpt_rl.storage.checkpoint import check_checkpoint

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

SETTINGS = """
align.methods=[grpo] reward.path=rewards.technical:sharpness rl.prompts=2 rl.group=4 rl.completions=2 rl.prefix_scales=1
rl.recipe.steps=3 rl.recipe.batch=8 rl.recipe.micro_batch=4 rl.recipe.lr=1e-3 tracking.best=null evaluation.diversity=0
"""
FAULTS = ["worker/complete_images", "iter-00-grpo/rank-0/step-2", "reward/score"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("online_faults")
    tiny_checkpoint(folder / "model")
    return folder


def test_a_worker_a_rank_and_a_reward_are_killed_inside_an_update(folder):
    def disturb(driver: psutil.Process) -> bool:
        """Ask for the faults once the first batch is there."""
        if not (folder / "disturbed/rollouts/iter-00-grpo/batch-00000.parquet").exists():
            return False
        for point in FAULTS:
            ask(folder / "faults/disturbed", point)
        return True

    whole = Ran(folder, "whole", *SETTINGS.split())
    assert whole.code == 0, whole.said[-3000:]
    ran = Ran(folder, "disturbed", *SETTINGS.split(), disturb=disturb)
    assert (ran.code, ran.left) == (0, []), ran.said[-3000:]
    final = "checkpoints/iter-00-grpo/final"
    expected = load_file(check_checkpoint(folder / "whole" / final))
    found = load_file(check_checkpoint(folder / "disturbed" / final))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    summary = json.loads((folder / "disturbed/summary.json").read_text())
    assert any("worker 0 lost during complete_images" in event for event in summary["events"])
    assert any("learner rank lost during policy_gradient" in event for event in summary["events"])
    lines = map(json.loads, (folder / "disturbed/metrics.jsonl").read_text().splitlines())
    assert max(line["restarts"] for line in lines if line["stage"] == "reward/reward") == 1
