"""Training on states that the workers have stored makes the weights that training with a language model makes."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.driver.test_faults import TIMES, flip
from tests.driver.test_interrupted import go
from tests.helpers.tiny import tiny_checkpoint

FROZEN = "dpo.frozen=[language_inputs]"


@pytest.mark.timeout(600)
def test_stored_states_change_no_number(tmp_path):
    tiny_checkpoint(tmp_path / "model")
    go(tmp_path, "computed", "end", settings=(FROZEN,))
    killed = "iter-00-dpo/rank-0/step-2"
    go(tmp_path, "stored", killed, "end", settings=(FROZEN, "dpo.stored_states=true"))
    weights, results, events = {}, {}, {}
    for name in ("computed", "stored"):
        weights[name] = load_file(tmp_path / name / "checkpoints/iter-00-dpo/final/weights.safetensors")
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        dpo = summary["iterations"][0]["dpo"]
        results[name] = {key: value for key, value in dpo.items() if key not in (*TIMES, "swap", "waited")}
        events[name] = summary["events"]
    assert results["stored"] == results["computed"] and results["stored"]["step0_max_abs_logratio"] == 0
    assert weights["stored"].keys() == weights["computed"].keys()
    assert all(torch.equal(weights["stored"][name], tensor) for name, tensor in weights["computed"].items())
    told = [event for event in events["stored"] if event.startswith("dpo.stored_states: ")]
    assert told and told[0].startswith("dpo.stored_states: 17 images in ")
    assert not list((tmp_path / "stored/states").glob("*")), "deleted once DPO is recorded"


@pytest.mark.timeout(600)
def test_states_are_stored_again_for_a_dpo_that_is_redone(tmp_path):
    tiny_checkpoint(tmp_path / "model")
    settings = FROZEN, "dpo.stored_states=true", "dpo.control=false"
    go(tmp_path, "redone", "iter-00/dpo_swap", settings=settings)
    final = tmp_path / "redone/checkpoints/iter-00-dpo/final/weights.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(final).items()}  # not views of the file
    flip(final)
    go(tmp_path, "redone", "end", settings=settings)
    assert all(torch.equal(weights[name], tensor) for name, tensor in load_file(final).items())
    told = json.loads((tmp_path / "redone/summary.json").read_text())["events"]
    assert [event.partition(" ")[0] for event in told].count("dpo.stored_states:") == 2


RUNS = "computed", "stored"
ONLINE = (
    "align.methods=[grpo,online_dpo]",
    "align.sft=false",
    "reward.path=rewards.technical:sharpness",
    "rl.frozen=[language_inputs]",
    "rl.prompts=2",
    "rl.group=4",
    "rl.updates=2",
    "rl.recipe.steps=4",
    "rl.recipe.batch=8",
    "rl.recipe.micro_batch=4",
    "rl.recipe.lr=1e-3",
    "evaluation.diversity=2",
)


@pytest.mark.timeout(600)
def test_online_methods_learn_the_same_from_stored_states(tmp_path):
    tiny_checkpoint(tmp_path / "model")
    go(tmp_path, "computed", "end", settings=ONLINE)
    points = "iter-00-grpo/rank-0/step-3", "iter-00-online_dpo/rank-0/step-2"
    go(tmp_path, "stored", *points, "end", settings=(*ONLINE, "rl.stored_states=true"))
    for method in ("grpo", "online_dpo"):
        paths = (tmp_path / name / f"checkpoints/iter-00-{method}/final/weights.safetensors" for name in RUNS)
        expected, weights = map(load_file, paths)
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in RUNS]
    computed, stored = (summary["iterations"][0]["grpo"] for summary in summaries)
    assert stored["first_update_max_abs_log_ratio"] == computed["first_update_max_abs_log_ratio"]
    told = [event for event in summaries[1]["events"] if event.startswith("rl.stored_states: ")]
    assert len(told) == 2 and told[0].startswith("rl.stored_states: 17 images in ")
    assert not list((tmp_path / "stored/states").glob("*")), "deleted once a method is recorded"
