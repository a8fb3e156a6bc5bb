"""A whole run of an adapter, over every stage and method: killed everywhere, exported, and continued.

Without a cluster (see ``tests.helpers.one_process``); two real ranks: ``tests.learners.test_adapter``.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.driver.test_faults import same
from tests.driver.test_interrupted import go
from tests.helpers.tiny import tiny_checkpoint
from vargpt_rl.model.adapter import merged_weight
from vargpt_rl.storage.adapter import BASE, WEIGHTS
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
OTHER = (
    "adapter.serving=merged",
    "adapter.reference=learner",
    "adapter.dropout=0.2",
    "adapter.targets=[image_decoder]",
    "adapter.full=[projectors]",
    "sft.recipe.ema=0.9",
)
POINTS = [
    "adapter/final/unmarked",
    "understanding/rank-0/step-1",
    "iter-00-sft/rank-0/step-2",
    "iter-00-dpo/rank-0/step-2",
    "iter-00-rft/step-000001/written",
    "iter-00-online_dpo/rank-0/step-2",
    "iter-00-grpo/rank-0/step-1",
    "edit/rank-0/step-1",
]


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


def assert_equal_weights(run, undisturbed) -> None:
    found, expected = weight_sets(run), weight_sets(undisturbed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    for folder in ("adapter", "model"):
        files = list((undisturbed / folder).glob("*.safetensors"))
        assert files and all((run / folder / each.name).read_bytes() == each.read_bytes() for each in files)


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


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_run_of_an_adapter_killed_everywhere_ends_the_same(folder):
    go(folder, "killed", *POINTS, "end", settings=(*STAGES, METHODS, *ONLINE, *LORA))
    same(folder / "killed", folder / "plain", but=("seconds_per_batch", "waited", "version"))
    assert_equal_weights(folder / "killed", folder / "plain")


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_merged_averaged_adapter_scored_by_the_learner_resumes_too(folder):
    settings = ("align.methods=[dpo,online_dpo]", *ONLINE, *LORA, *OTHER)
    go(folder, "other", "end", settings=settings)
    points = ["iter-00-sft/rank-0/step-2", "iter-00-dpo/rank-0/step-2", "iter-00-online_dpo/rank-0/step-2"]
    go(folder, "other-killed", *points, "end", settings=settings)
    same(folder / "other-killed", folder / "other", but=("seconds_per_batch", "waited", "version"))
    assert_equal_weights(folder / "other-killed", folder / "other")
    results = json.loads((folder / "other/summary.json").read_text())["iterations"][0]
    assert results["dpo"]["step0_max_abs_logratio"] == 0, "policy and reference in one process"
    assert any(".lora_" not in name for name in weight_sets(folder / "other")), "the projectors train in full"


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


@pytest.mark.timeout(900)
def test_a_run_starts_from_the_adapter_of_another(folder):
    settings = (
        f"checkpoint={folder}/plain/adapter",
        "align.sft=false",
        "align.methods=[rft]",
        *ONLINE,
        *LORA,
    )
    go(folder, "continued", "end", settings=settings)
    run = folder / "continued"
    start, expected = (stored_in_folder(path) for path in (run / "start", folder / "plain/model"))
    assert start.keys() == expected.keys()
    assert all(torch.equal(start[name].read(), stored.read()) for name, stored in expected.items())
    described = [json.loads((folder / name / "adapter" / BASE).read_text()) for name in ("plain", "continued")]
    assert described[0]["xxh3_128"] != described[1]["xxh3_128"], "a new adapter, on the merged model"
