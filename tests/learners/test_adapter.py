"""Adapters on two real ranks: a stage trains its matrices alone, and a worker scores as the learner does."""

import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from actors.worker import Worker
from learners.config import DpoConfig, LearnerConfig, Recipe, RlConfig
from learners.jobs import DpoJob, PolicyGradientJob, training_checkpoints
from tests.helpers.forks import ForkedRanks
from tests.helpers.streams import corpus_of, sft_job
from tests.helpers.tiny import BITS, Patches
from vargpt_rl.data.policy_batches import batch_path, write_policy_batch
from vargpt_rl.data.preferences import write_table
from vargpt_rl.data.samples import Probe, Prompt
from vargpt_rl.model.adapter import AdapterConfig, is_adapter
from vargpt_rl.model.bits import pack
from vargpt_rl.model.scales import token_count
from vargpt_rl.stages import STAGES, freeze
from vargpt_rl.storage.adapter import adapted_on_meta, write_fresh_adapter
from vargpt_rl.storage.checkpoint import Policy, check_checkpoint

SIDE = 64
PROMPT = Prompt("p", "a red circle", "Here:")
STEPS = 2
LORA = AdapterConfig("lora", rank=4, dropout=0.3, targets=["language_model", "image_decoder"], full=["projectors"])
RECIPE = Recipe(steps=STEPS, batch=4, micro_batch=2, lr=1e-2, warmup_ratio=0.0, zero=2, gradient_checkpointing=1)


@pytest.fixture(scope="module")
def start(checkpoint, tmp_path_factory) -> Policy:
    """A policy whose adapter has an effect in the decoder, as after an earlier stage."""
    weights = tmp_path_factory.mktemp("adapter") / "final"
    write_fresh_adapter(str(checkpoint), LORA, weights, 0, torch.float32)
    return Policy(str(checkpoint), (weights,), LORA)


def unseen(line: dict) -> None:
    """Ignore a line of the learner's log."""


def worker_of(policy: Policy) -> Worker:
    """A worker that holds a policy."""
    worker = Worker(policy.model, Patches(), threads=1, adapter=policy.adapter)
    for weights in policy.weights:
        worker.model.load_state_dict(load_file(check_checkpoint(weights)), strict=False)
    return worker


def images(worker: Worker, count: int) -> list[bytes]:
    tokens = token_count(worker.image_tokenizer.schedule_for(SIDE))
    rng = np.random.default_rng(2)
    return [pack(rng.integers(0, 2, (tokens, BITS), np.uint8), 2) for _ in range(count)]


def table_of(worker: Worker, path: Path) -> None:
    """Write four pairs of random images, scored by a worker in the learner's micro-batches."""
    drawn = images(worker, 8)
    rows = []
    for at in range(0, 8, 4):
        scores = worker.score([(PROMPT, packed) for packed in drawn[at : at + 4]], SIDE)
        for i in range(2):
            row = {"pair_id": f"pair-{at + i}", "prompt_id": f"prompt-{at + i}", "prompt": PROMPT.text}
            row |= {"reply": PROMPT.reply, "resolution": SIDE, "sampling": "{}", "reference_version": 0}
            for side, j in {"chosen": i, "rejected": 2 + i}.items():
                row |= {f"{side}_bits": drawn[at + j], f"{side}_source": "test", f"{side}_reward": None}
                row |= {f"{side}_seed": None, f"{side}_version": None}
                row[f"reference_{side}_logp"] = scores[j].total
                row[f"reference_{side}_by_scale"] = scores[j].by_scale
            rows.append(row)
    write_table(path, rows)


@pytest.fixture(scope="module")
def probe(start) -> Probe:
    return Probe(PROMPT, images(worker_of(start), 1)[0], SIDE)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    features = np.random.default_rng(0).standard_normal((12, BITS, SIDE // 16, SIDE // 16))
    return corpus_of(tmp_path_factory.mktemp("corpus"), features).at(SIDE)


@pytest.fixture(scope="module")
def group():
    with ForkedRanks(LearnerConfig(ranks=2, save_every=1)) as group:
        yield group


@pytest.fixture(scope="module")
def alone():
    """A single rank."""
    with ForkedRanks(LearnerConfig(ranks=1)) as alone:
        yield alone


@pytest.fixture(scope="module")
def tuned(group, start, corpus, probe, tmp_path_factory) -> tuple[Policy, dict]:
    """The policy after SFT of the adapter, with dropout and every block recomputed; and the result."""
    output = tmp_path_factory.mktemp("sft")
    result = group.run(sft_job("sft", start, corpus, RECIPE, output, probe), unseen)
    return start.plus(output / "final"), result


def test_sft_trains_the_matrices_of_its_own_parts(tuned, start, probe):
    policy, result = tuned
    trained = load_file(check_checkpoint(policy.weights[-1]))
    assert sorted(trained) == freeze(adapted_on_meta(start.model, LORA), STAGES["sft"], LORA)
    assert all(is_adapter(name) != name.startswith("projector_") for name in trained)
    assert not any(name.startswith("model.") for name in trained)
    before = load_file(check_checkpoint(start.weights[0]))
    # The first step moves no first matrix: where the second is 0, it has no gradient.
    moved = {name for name, tensor in trained.items() if not torch.equal(tensor, before[name])}
    assert {name for name in trained if ".lora_A." not in name} <= moved
    assert result["frozen"] == ["image_tokenizer", "lm_head", "model"]
    assert result["probe"] == pytest.approx(worker_of(policy).score([(PROMPT, probe.bits)], SIDE)[0].total, abs=1e-3)
    assert result["probe"] != pytest.approx(worker_of(start).score([(PROMPT, probe.bits)], SIDE)[0].total, abs=1e-2)


def test_a_resumed_stage_is_bitwise_the_uninterrupted_one(group, tuned, start, corpus, probe, tmp_path):
    policy, whole = tuned
    shutil.copytree(training_checkpoints(policy.weights[-1].parent), training_checkpoints(tmp_path / "again"))
    lines: list[dict] = []
    resumed = group.run(sft_job("sft", start, corpus, RECIPE, tmp_path / "again", probe), lines.append)
    assert [line["step"] for line in lines if "loss" in line] == [2]
    expected, found = (load_file(check_checkpoint(path)) for path in (policy.weights[-1], tmp_path / "again/final"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert resumed["probe"] == whole["probe"]
    (kept,) = training_checkpoints(policy.weights[-1].parent).glob("checkpoint-*")
    saved = {name.split("/", 2)[2] for path in kept.rglob("state-*.safetensors") for name in load_file(path)}
    assert saved == expected.keys(), "matrices and projectors, all that trains"


def test_an_average_is_the_result_and_resumes_bitwise(group, tuned, start, corpus, probe, tmp_path):
    installed = find_spec("bitsandbytes") is not None
    recipe = replace(RECIPE, ema=0.9, optimizer="adamw_8bit" if installed else "adamw")
    whole = group.run(sft_job("sft", start, corpus, recipe, tmp_path / "whole", probe), unseen)
    shutil.copytree(training_checkpoints(tmp_path / "whole"), training_checkpoints(tmp_path / "again"))
    resumed = group.run(sft_job("sft", start, corpus, recipe, tmp_path / "again", probe), unseen)
    average, again, last = (
        load_file(check_checkpoint(path))
        for path in (tmp_path / "whole/final", tmp_path / "again/final", tuned[0].weights[-1])
    )
    assert all(torch.equal(again[name], tensor) for name, tensor in average.items())
    assert resumed["probe"] == whole["probe"]
    worker = worker_of(start.plus(tmp_path / "whole/final"))
    assert whole["probe"] == pytest.approx(worker.score([(PROMPT, probe.bits)], SIDE)[0].total, abs=1e-3)
    before = load_file(check_checkpoint(start.weights[0]))
    moved = [((average[name] - before[name]).norm(), (last[name] - before[name]).norm()) for name in average]
    assert 0 < sum(own for own, _ in moved) < 0.9 * sum(other for _, other in moved), "between start and end"


@pytest.mark.parametrize("zero", [2, 3])
def test_offloaded_states_give_the_same_weights(group, start, corpus, probe, tmp_path, zero):
    plain = replace(RECIPE, zero=zero)
    results, weights = [], []
    for name, recipe in (("kept", plain), ("offloaded", replace(plain, offload=True))):
        results.append(group.run(sft_job("sft", start, corpus, recipe, tmp_path / name, probe), unseen))
        weights.append(load_file(check_checkpoint(tmp_path / name / "final")))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    assert results[1]["probe"] == pytest.approx(results[0]["probe"], abs=1e-3)


def dpo_job(start: Policy, probe: Probe, folder: Path, zero: int) -> DpoJob:
    """A job on pairs that a worker with the start has scored."""
    table_of(worker_of(start), folder / "pairs.parquet")
    return DpoJob(
        start=start,
        table=folder / "pairs.parquet",
        recipe=replace(RECIPE, zero=zero, lr=1e-3),
        dpo=DpoConfig(),
        output=folder / "dpo",
        seed=0,
        probe=probe,
    )


def test_ranks_and_zero_stages_have_the_same_gradients(group, alone, tuned, probe, tmp_path):
    policy = replace(tuned[0], adapter=replace(LORA, reference="learner"))
    job = dpo_job(policy, probe, tmp_path, 2)
    split = replace(job, start=tuned[0], recipe=replace(job.recipe, zero=3))  # with the workers' reference
    found = []
    for name, ranks, each in (("two", group, job), ("one", alone, job), ("zero 3", group, split)):
        lines: list[dict] = []
        result = ranks.run(replace(each, output=tmp_path / name), lines.append)
        same_pass = each is job
        assert result["step0_max_abs_logratio"] <= (0.0 if same_pass else 1e-4), name
        found.append([(line["loss"], line["grad_norm"]) for line in lines if "loss" in line])
    assert len(found[0]) == STEPS
    for other in found[1:]:
        np.testing.assert_allclose(found[0], other, rtol=1e-3)


@pytest.mark.parametrize("zero", [2, 3])
def test_dpo_continues_the_adapter_from_its_own_scores(group, tuned, probe, tmp_path, zero):
    policy, _ = tuned
    result = group.run(dpo_job(policy, probe, tmp_path, zero), unseen)
    assert result["step0_max_abs_logratio"] <= 1e-4, "dropout is off, and the reference is the policy"
    assert result["loss_first"] == pytest.approx(np.log(2), abs=1e-4)
    assert result["loss_last"] < result["loss_first"]
    trained = worker_of(policy.plus(tmp_path / "dpo/final"))
    assert result["probe"] == pytest.approx(trained.score([(PROMPT, probe.bits)], SIDE)[0].total, abs=1e-3)


@pytest.mark.parametrize("method", ["grpo", "rft"])
def test_online_methods_train_the_adapter_without_dropout(group, tuned, probe, tmp_path, method):
    policy, _ = tuned
    worker = worker_of(policy)
    drawn = images(worker, 4)
    scores = [score for at in (0, 2) for score in worker.score([(PROMPT, each) for each in drawn[at : at + 2]], SIDE)]
    rows = [
        {"prompt_id": str(i), "prompt": PROMPT.text, "reply": PROMPT.reply, "resolution": SIDE, "bits": drawn[i],
         "seed": i, "sampling": "{}", "tau": 1.0, "version": 0, "learner_step": 0, "group": i // 2, "reward": i % 2,
         "advantage": [2.0 * (i % 2) - 1], "sampler_by_scale": scores[i].by_scale, "reference_by_scale": None}
        for i in range(4)
    ]  # fmt: skip
    write_policy_batch(batch_path(tmp_path, 0), rows)
    job = PolicyGradientJob(
        start=policy,
        batches=tmp_path,
        recipe=replace(RECIPE, steps=1, lr=1e-3),
        rl=RlConfig(),
        output=tmp_path / "rl",
        seed=0,
        probe=probe,
        method=method,
    )
    result = group.run(job, unseen)
    assert result["first_update_max_abs_log_ratio"] <= 2e-3, "the learner scores as the worker that drew"
    trained, before = (load_file(check_checkpoint(path)) for path in (tmp_path / "rl/final", policy.weights[-1]))
    assert trained.keys() == before.keys() and any(not torch.equal(before[name], own) for name, own in trained.items())
    after = worker_of(policy.plus(tmp_path / "rl/final"))
    assert result["probe"] == pytest.approx(after.score([(PROMPT, probe.bits)], SIDE)[0].total, abs=1e-3)


def test_the_learner_scores_in_4_bits_as_the_worker_does(alone, tuned, probe, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (make test-qlora)")
    policy = replace(tuned[0], adapter=replace(LORA, four_bit=["language_model", "image_decoder"]))
    result = alone.run(dpo_job(policy, probe, tmp_path, 2), unseen)
    assert result["step0_max_abs_logratio"] <= 1e-4 and result["loss_last"] < result["loss_first"]
    trained = policy.plus(tmp_path / "dpo/final")
    whole = replace(trained, adapter=LORA)
    small, large = (worker_of(each).score([(PROMPT, probe.bits)], SIDE)[0].total for each in (trained, whole))
    assert result["probe"] == pytest.approx(small, abs=1e-3) and abs(small - large) > 0.01
