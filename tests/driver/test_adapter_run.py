"""A whole run of an adapter, over every stage and method, and its export.

Without a cluster (see ``tests.helpers.one_process``); two real ranks: ``tests.learners.test_adapter``.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.driver.test_interrupted import go
from tests.helpers.tiny import tiny_checkpoint
from vargpt_rl.model.adapter import merged_weight
from vargpt_rl.storage.adapter import WEIGHTS
from vargpt_rl.storage.sharded import stored_in_folder

ONLINE = (
    "reward.path=rewards.technical:sharpness",
    "evaluation.reward.path=null",
    "evaluation.diversity=2",
    "rl.prompts=2",
    "rl.group=4",
    "rl.kl=0.01",
    "rl.recipe.steps=2",
    "rl.recipe.batch=8",
    "rl.recipe.micro_batch=4",
    "rl.recipe.lr=1e-3",
)
STAGES = (
    "stages=[pretrain,understanding,align,edit]",
    *(f"{name}.records=4" for name in ("pretrain", "understanding", "edit")),
    *(
        f"{name}.recipe.{key}={value}"
        for name in ("pretrain", "understanding", "edit")
        for key, value in (("steps", 1), ("batch", 4), ("micro_batch", 2))
    ),
    "understanding.questions=4",
    "understanding.drawing_share=0.5",
    "evaluation.edits=2",
)
METHODS = "align.methods=[dpo,rft,online_dpo,grpo]"
LORA = ("adapter=lora", "adapter.rank=4", "sft.recipe.lr=1e-3", "dpo.recipe.lr=1e-3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of runs and their start model; ``plain`` is a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("adapter")
    tiny_checkpoint(folder / "model")
    go(folder, "plain", "end", settings=(*STAGES, METHODS, *ONLINE, *LORA))
    return folder


def weight_sets(run) -> dict[str, torch.Tensor]:
    """Return all tensors that a run has trained, by checkpoint and name."""
    paths = sorted((run / "checkpoints").glob("*/final/weights.safetensors"))
    return {f"{path.parent.parent.name}/{name}": each for path in paths for name, each in load_file(path).items()}


@pytest.mark.timeout(900)
def test_every_stage_and_method_trains_the_adapter(folder):
    sets = weight_sets(folder / "plain")
    jobs = list(dict.fromkeys(name.partition("/")[0] for name in sets))
    assert {"adapter", *(f"iter-00-{name}" for name in ("sft", "dpo", "rft", "online_dpo", "grpo"))} <= set(jobs)
    assert all(".lora_" in name for name in sets), "nothing but matrices"
    start = {name.removeprefix("adapter/"): tensor for name, tensor in sets.items() if name.startswith("adapter/")}
    for job in set(jobs) - {"adapter"}:
        own = {name.removeprefix(f"{job}/"): tensor for name, tensor in sets.items() if name.startswith(f"{job}/")}
        assert own.keys() <= start.keys()
        assert any(not torch.equal(start[name], tensor) for name, tensor in own.items()), job
    results = json.loads((folder / "plain/summary.json").read_text())["iterations"][0]
    assert results["dpo"]["step0_max_abs_logratio"] <= 1e-4
    for method in ("rft", "online_dpo", "grpo"):
        assert results[method]["first_update_max_abs_log_ratio"] <= 2e-3, method


def test_the_model_of_a_run_is_its_base_with_the_adapter_merged(folder):
    base = {name: stored.read() for name, stored in stored_in_folder(folder / "model").items()}
    merged = {name: stored.read() for name, stored in stored_in_folder(folder / "plain/model").items()}
    own = load_file(folder / "plain/adapter" / WEIGHTS)
    assert merged.keys() == base.keys()
    layers = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in own}
    for name, tensor in base.items():
        layer = name.removesuffix(".weight")
        if layer in layers:
            a_rI, b_Or = (own[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
            tensor = merged_weight(tensor, a_rI, b_Or, 32 / 4)
        assert torch.equal(merged[name], tensor), name
    assert any(not torch.equal(merged[name], tensor) for name, tensor in base.items())
