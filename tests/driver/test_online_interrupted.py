"""Online methods that are killed between and inside updates end with the very weights of a run that was not.

Really killed, but without a cluster (see ``tests.helpers.one_process``); with one: ``tests.driver.test_faults``.
"""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.driver.test_faults import TIMES
from tests.helpers.forks import run_loop
from tests.helpers.tiny import tiny_checkpoint
from vargpt_rl.driver.run import differences
from vargpt_rl.storage.checkpoint import check_checkpoint

SMALL = """
stages=[align] iterations=1 resolutions=[32] learner.ranks=1 rollout.workers=1 rollout.batch_size=4
sft.records=4 sft.checkpoints=[] sft.recipe.steps=1 sft.recipe.batch=4 sft.recipe.micro_batch=4
align.methods=[rft,online_dpo,grpo] reward.path=rewards.technical:sharpness
rl.prompts=2 rl.group=4 rl.completions=2 rl.prefix_scales=1 rl.kl=0.01
rl.recipe.steps=2 rl.recipe.batch=8 rl.recipe.micro_batch=4 rl.recipe.lr=1e-3
rl.guard.validate_every=1 rl.guard.prompts=2 evaluation.diversity=2
evaluation.prompts=2 evaluation.questions=2 evaluation.grid=2 tracking.wandb=disabled tracking.best=null
"""
POINTS = [
    "batch-00000.parquet/written",
    "iter-00-rft/rank-0/step-1",
    "iter-00-rft/step-000001/written",
    "figures-00001.json/written",
    "iter-00-online_dpo/rank-0/step-2",
    "iter-00-online_dpo/final/written",
    "iter-00/online_dpo",
    "worker/complete_images",
    "iter-00-grpo/rank-0/step-1",
    "guard.json/written",
    "iter-00/grpo",
]


def go(folder, name: str, *points: str) -> tuple[dict, dict[str, torch.Tensor], list[str]]:
    """The summary, the exported weights and the events of a run that is killed at each point, and then ends."""
    settings = [f"runs={folder}", f"checkpoint={folder}/model", f"name={name}", *SMALL.split()]
    log = folder / f"{name}.log"
    ends = run_loop(settings, *points, "end", faults=folder / f"{name}-faults", log=log)
    expected = [[point, -signal.SIGKILL, False] for point in points] + [["end", 0, False]]
    assert [end[:3] for end in ends] == expected, log.read_text()[-3000:]
    summary = json.loads((folder / name / "summary.json").read_text())
    weights: dict[str, torch.Tensor] = {}
    for method in ("rft", "online_dpo", "grpo"):
        found = load_file(check_checkpoint(folder / name / f"checkpoints/iter-00-{method}/final"))
        weights |= {f"{method}/{key}": tensor for key, tensor in found.items()}
    return summary["iterations"][0], weights, summary["events"]


def timeless(value):
    """Leave out times, and versions, which count swaps: a resumed run makes fewer or more."""
    if isinstance(value, dict):
        left_out = (*TIMES, "seconds_per_batch", "waited", "version")
        return {key: timeless(each) for key, each in value.items() if key not in left_out}
    return value


@pytest.mark.timeout(900)
def test_online_methods_killed_everywhere_end_with_the_same_weights(tmp_path):
    tiny_checkpoint(tmp_path / "model")
    expected, weights, events = go(tmp_path, "undisturbed")
    found, resumed, resumptions = go(tmp_path, "killed", *POINTS)
    assert differences(timeless(expected), timeless(found)) == []
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())
    assert any(not torch.equal(weights[f"rft/{name}"], weights[f"grpo/{name}"]) for name in _names(weights))
    assert not [event for event in events if "resuming" in event] and len(resumptions) >= len(POINTS)
    for method in ("rft", "online_dpo", "grpo"):
        result = found[method]
        assert result["groups"]["used"] == 4 and result["steps"] == 2
        assert 0 <= result["first_update_max_abs_log_ratio"] <= 2e-3
        assert set(result["validated"]) == {"0", "1", "2"}
        assert {"reward_first", "judge_last", "diversity_last", "seconds_per_batch"} <= result.keys()
        assert {"draw", "judge", "learn", "swap"} <= result["seconds_per_batch"].keys()
    assert not list((tmp_path / "killed/rollouts").glob("*")), "batches are deleted once a method is recorded"


def _names(weights: dict[str, torch.Tensor]) -> list[str]:
    return [name.removeprefix("rft/") for name in weights if name.startswith("rft/")]
