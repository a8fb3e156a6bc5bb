"""The learner's own reference: its trained tensors as it found them, equal to the workers' scores of them."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from learners.config import DpoConfig, RlConfig
from learners.dpo import ImageDpoTrainer
from learners.grpo import PolicyGradientTrainer
from learners.image_policy import ImagePolicy
from learners.methods import ONLINE
from learners.policy_batches import PolicyBatches
from learners.reference import StartWeights
from tests.helpers.dpo import cpu_dpo_config
from tests.helpers.tiny import BITS
from vargpt_rl.data.batches import PairCollator, PolicyBatchCollator
from vargpt_rl.model.adapter import AdapterConfig, attach, is_adapter
from vargpt_rl.model.bits import pack
from vargpt_rl.model.scales import schedule_for, token_count
from vargpt_rl.stages import STAGES, freeze

SIDE = 64
TOKENS = token_count(schedule_for(SIDE))
LORA = AdapterConfig("lora", rank=4, full=["projectors"], targets=["image_decoder"])
KEYS = ("input_ids", "attention_mask", "bits", "resolution")


@pytest.fixture
def policy(checkpoint):
    """A policy with an adapter that has an effect."""
    policy = ImagePolicy.from_pretrained(checkpoint)
    attach(policy, LORA)
    freeze(policy, STAGES["dpo"], LORA)
    move(policy, 0)
    return policy.train()


def move(policy, seed: int) -> None:
    """Change everything that trains."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.fixture
def reference(policy):
    return StartWeights(policy, [name for name, parameter in policy.named_parameters() if parameter.requires_grad])


def images(count: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    return [pack(rng.integers(0, 2, (TOKENS, BITS)).astype(np.uint8)) for _ in range(count)]


@pytest.fixture
def pairs(policy, chat):
    """Collated pairs with the policy's own scores as references."""
    rows = [
        {"prompt": "a star", "reply": "Here:", "resolution": SIDE, "chosen_bits": chosen, "rejected_bits": rejected}
        for chosen, rejected in zip(images(4)[:2], images(4)[2:], strict=True)
    ]
    blank = [0.0] * len(schedule_for(SIDE))
    for row in rows:
        row |= {f"reference_{side}_{key}": value for side in ("chosen", "rejected")
                for key, value in (("logp", 0.0), ("by_scale", np.array(blank)))}  # fmt: skip
    batch = PairCollator(chat)(rows)
    with torch.no_grad():
        scores_BK = policy(**{key: batch[key] for key in KEYS}).log_probs_BK
    chosen, rejected = scores_BK.sum(1).chunk(2)
    return batch | {"ref_by_scale": scores_BK, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


def dpo_trainer(policy, chat, folder, reference) -> ImageDpoTrainer:
    return ImageDpoTrainer(
        settings=DpoConfig(),
        pairs=SimpleNamespace(rows=Dataset.from_list([{"resolution": SIDE}]), micro_batch=None),
        reference=reference,
        model=policy,
        args=cpu_dpo_config(folder),
        data_collator=PairCollator(chat),
        processing_class=chat.tokenizer,
    )


def test_the_start_is_in_force_only_inside(policy, reference):
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    move(policy, 1)
    moved = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    with pytest.raises(KeyError), reference.in_force():
        assert not torch.is_grad_enabled()
        assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
        raise KeyError
    assert all(torch.equal(tensor, moved[name]) for name, tensor in policy.state_dict().items())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in moved.items() if is_adapter(name))


def test_dpo_is_the_same_with_either_reference(policy, reference, pairs, chat, tmp_path):
    ours = dpo_trainer(policy, chat, tmp_path, reference)
    assert ours.compute_loss(policy, dict(pairs)).item() == pytest.approx(math.log(2), abs=1e-6)
    assert ours.step0_max_abs_logratio == 0.0
    theirs = dpo_trainer(copy.deepcopy(policy), chat, tmp_path, None)
    losses = []
    for trainer in (ours, theirs):
        move(trainer.model, 2)
        trainer.state.global_step = 1
        loss = trainer.compute_loss(trainer.model, dict(pairs))
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and abs(losses[0] - math.log(2)) > 1e-3
    for (name, own), (_, other) in zip(policy.named_parameters(), theirs.model.named_parameters(), strict=True):
        if own.requires_grad:
            torch.testing.assert_close(own.grad, other.grad, msg=name)


def test_workers_that_score_another_reference_stop_dpo(policy, reference, pairs, chat, tmp_path):
    trainer = dpo_trainer(policy, chat, tmp_path, reference)
    wrong = pairs | {"ref_chosen_logps": pairs["ref_chosen_logps"] + 1.0}
    with pytest.raises(RuntimeError, match="the workers' reference and the learner's differ by 1 nats"):
        trainer.compute_loss(policy, wrong)


@pytest.mark.parametrize("method", ["online_dpo", "grpo"])
def test_online_methods_need_no_scores_of_the_reference(policy, reference, chat, tmp_path, method):
    rows = [
        {"prompt_id": str(i), "prompt": "a star", "reply": "Here:", "resolution": SIDE, "bits": bits, "seed": i,
         "sampling": "{}", "tau": 0.5, "version": 0, "learner_step": 0, "group": 0, "reward": float(i),
         "advantage": [2.0 * i - 1], "sampler_by_scale": None, "reference_by_scale": None, "weight": 1.0}
        for i, bits in enumerate(images(2))
    ]  # fmt: skip
    batch = PolicyBatchCollator(chat)(rows)
    with torch.no_grad():
        scores = policy(**{key: batch[key] for key in KEYS}, tau=0.5).log_probs_BK
    for row, score in zip(rows, scores.tolist(), strict=True):
        row["sampler_by_scale"] = score
    given = PolicyBatchCollator(chat)(rows)
    scored = PolicyBatchCollator(chat)([row | {"reference_by_scale": row["sampler_by_scale"]} for row in rows])
    settings = RlConfig(kl=0.5)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    batches = PolicyBatches(tmp_path, steps=1, updates=1, batch=2, micro_batch=2, collate=None)
    trainers = []
    for inputs, own in ((given, reference), (scored, None)):
        trainer = PolicyGradientTrainer(settings, batches, ONLINE[method], reference=own, model=policy, args=arguments)
        trainer.model.train()
        trainer.compute_loss(policy, inputs)
        assert trainer.first_update_max_abs_log_ratio <= 2e-4
        trainers.append(trainer)
    move(policy, 3)
    values = []
    for trainer, inputs in zip(trainers, (given, scored), strict=True):
        trainer.state.global_step = 1
        values.append(trainer.compute_loss(policy, inputs).item())
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    without = PolicyGradientTrainer(settings, batches, ONLINE[method], model=policy, args=arguments)
    with pytest.raises(ValueError, match="reference_by_scale is empty"):
        without.compute_loss(policy, given)
