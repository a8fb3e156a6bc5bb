"""Preference losses on image tokens, in one process: TRL's own, fed with ours."""

import inspect
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import DPOTrainer

from learners.config import DpoConfig
from learners.dpo import ImageDpoTrainer, log_prob_scale
from learners.image_policy import ImagePolicy
from tests.helpers.dpo import cpu_dpo_config
from tests.helpers.tiny import BITS
from vargpt_rl.common.settings import parse
from vargpt_rl.data.batches import PairCollator
from vargpt_rl.losses.credit import scale_credit, weighted_sum
from vargpt_rl.model.bits import Bits, pack
from vargpt_rl.model.likelihood import bit_log_probs, scale_sums
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.scales import schedule_for, token_count
from vargpt_rl.model.unified import Drawing

SIDE = 64
SCHEDULE = schedule_for(SIDE)
TOKENS = token_count(SCHEDULE)
LOSS_TYPES = re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss))
SMOOTHING = {"exo_pair": 0.1, "robust": 0.1}  # these two are undefined or plain without


@pytest.fixture(scope="module")
def pairs(checkpoint, chat):
    """Two pairs of random bits, scored by the checkpoint."""
    model, rng = Vargpt.from_pretrained(checkpoint).eval(), np.random.default_rng(0)

    def pair(text: str) -> dict:
        bits = rng.integers(0, 2, (2, TOKENS, BITS)).astype(np.uint8)
        given = torch.from_numpy(bits)
        ids = torch.tensor([chat.drawn(text, "Here:", TOKENS).ids] * 2)
        with torch.no_grad():
            logits = model(ids, drawing=Drawing(Bits().replay(given, SCHEDULE).inputs_BLd, (SIDE, SIDE))).image_logits
        by_scale = scale_sums(bit_log_probs(logits, given), SCHEDULE)
        row = {"prompt": text, "reply": "Here:", "resolution": SIDE}
        for i, side in enumerate(("chosen", "rejected")):
            row[f"{side}_bits"] = pack(bits[i])
            row[f"reference_{side}_logp"] = by_scale[i].sum().item()
            row[f"reference_{side}_by_scale"] = by_scale[i].numpy()
        return row

    return [pair("a star"), pair("two small blue squares above a triangle")]


@pytest.fixture
def batch(chat, pairs):
    return PairCollator(chat)(pairs)


@pytest.fixture(scope="module")
def shared_model(checkpoint):
    """A policy apart from its references: every log-ratio is off zero."""
    torch.manual_seed(1)
    model = ImagePolicy.from_pretrained(checkpoint)
    with torch.no_grad():
        model.image_decoder.head.bias.add_(0.05 * torch.randn(2 * BITS))
    return model


@pytest.fixture
def trainer(checkpoint, chat, tmp_path):
    def build(model, norm="sum", alpha=0.0, scales=None, **settings) -> ImageDpoTrainer:
        return ImageDpoTrainer(
            settings=DpoConfig(logp_norm=norm, credit_alpha=alpha, credit_scales=scales),
            model=model,
            args=cpu_dpo_config(tmp_path, **settings),
            data_collator=PairCollator(chat, scales),
            pairs=SimpleNamespace(rows=Dataset.from_list([{"resolution": SIDE}]), micro_batch=None),
            processing_class=chat.tokenizer,
        )

    return build


def loss_of(trainer: ImageDpoTrainer, batch: dict) -> torch.Tensor:
    """After the first update, when log-ratios may be off zero."""
    trainer.state.global_step = 1
    trainer.model.train()
    return trainer.compute_loss(trainer.model, batch)


def log_ratios(model: ImagePolicy, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        logits = Vargpt.forward(
            model,
            batch["input_ids"],
            batch["attention_mask"],
            Drawing(Bits().replay(batch["bits"], SCHEDULE).inputs_BLd, (SIDE, SIDE)),
        ).image_logits
    policy = bit_log_probs(logits, batch["bits"]).double().sum((1, 2))
    return (policy - torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])).chunk(2)


def test_trl_offers_the_losses_that_are_tested():
    assert {"sigmoid", "ipo", "hinge", "exo_pair", "robust", "sft"} <= set(LOSS_TYPES)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_of_trl_is_finite_and_has_gradients(trainer, shared_model, batch, loss_type):
    built = trainer(shared_model, loss_type=[loss_type], label_smoothing=SMOOTHING.get(loss_type, 0.0))
    loss = loss_of(built, batch)
    assert loss.isfinite()
    loss.backward()
    gradient = shared_model.image_decoder.head.weight.grad
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
    shared_model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_sigmoid_loss_is_that_of_the_papers(trainer, shared_model, batch, beta):
    chosen, rejected = log_ratios(shared_model, batch)
    assert (chosen - rejected).abs().min() > 0.01
    expected = -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean()
    # log-probabilities of about -120 nats, in fp32 before the sum
    assert loss_of(trainer(shared_model, beta=beta), batch).item() == pytest.approx(expected.item(), abs=1e-5)


def test_several_losses_are_added_with_their_weights(trainer, shared_model, batch):
    alone = [loss_of(trainer(shared_model, loss_type=[name]), batch).item() for name in ("sigmoid", "sft")]
    both = loss_of(trainer(shared_model, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.3]), batch).item()
    assert both == pytest.approx(alone[0] + 0.3 * alone[1], rel=1e-6)
    chosen = log_ratios(shared_model, batch)[0] + batch["ref_chosen_logps"]
    assert alone[1] == pytest.approx(-chosen.mean().item() / TOKENS, rel=1e-5), "sft: the mean over image tokens"


@pytest.mark.parametrize(("norm", "terms"), [("per_token", TOKENS), ("per_bit", TOKENS * BITS)])
def test_normalised_sums_need_a_proportionally_larger_beta(trainer, shared_model, batch, norm, terms):
    summed = loss_of(trainer(shared_model), batch).item()
    assert loss_of(trainer(shared_model, norm, beta=0.1 * terms), batch).item() == pytest.approx(summed, abs=1e-5)
    assert loss_of(trainer(shared_model, norm), batch).item() != pytest.approx(summed, abs=1e-5)
    assert log_prob_scale(norm, TOKENS, BITS) == pytest.approx(1 / terms)


def test_log_probabilities_stand_at_image_tokens_only(shared_model, batch):
    output = shared_model(**{key: batch[key] for key in ("input_ids", "attention_mask", "bits", "resolution")})
    at_image = batch["completion_mask"][:, 1:].bool()
    assert output.log_probs.dtype == torch.float64
    assert (output.log_probs[at_image] < 0).all()
    assert (output.entropy[at_image] > 0).all() and (output.entropy <= math.log(2)).all(), "nats a bit"
    for values in (output.log_probs, output.entropy, output.mean_logits, output.is_top1):
        assert values.shape == at_image.shape
        assert not values[~at_image].any()
    torch.testing.assert_close(output.log_probs.sum(1), output.log_probs_BK.sum(1))
    chosen, rejected = log_ratios(shared_model, batch)
    references = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    torch.testing.assert_close(output.log_probs.sum(1), torch.cat([chosen, rejected]) + references, rtol=0, atol=1e-4)


def test_gradients_come_from_image_tokens_alone(trainer, shared_model, batch):
    def gradients(given: dict) -> dict[str, torch.Tensor]:
        shared_model.zero_grad(set_to_none=True)
        loss_of(trainer(shared_model), given).backward()
        return {name: p.grad for name, p in shared_model.named_parameters() if p.grad is not None}

    found = gradients(batch)
    assert not any(name.startswith(("lm_head", "image_tokenizer", "model.visual")) for name in found)
    # The words after the image are no part of the loss.
    closing = batch | {"input_ids": batch["input_ids"].clone()}
    after = (batch["completion_mask"].cumsum(1) == TOKENS) & (batch["completion_mask"] == 0)
    assert after.any(1).all()
    closing["input_ids"][after] = 42
    other = gradients(closing)
    shared_model.zero_grad(set_to_none=True)
    assert found.keys() == other.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(other[name], gradient, msg=name)


def test_step_0_fails_if_policy_and_reference_differ(checkpoint, trainer, batch):
    fresh = trainer(ImagePolicy.from_pretrained(checkpoint))
    fresh.model.train()
    assert fresh.compute_loss(fresh.model, dict(batch)).item() == pytest.approx(math.log(2), abs=1e-5)
    assert 0 <= fresh.step0_max_abs_logratio <= 1e-4
    for side in ("chosen", "rejected"):
        wrong = batch | {f"ref_{side}_logps": batch[f"ref_{side}_logps"] + torch.tensor([0.0, 1.0])}
        with pytest.raises(RuntimeError, match="DPO step 0: policy and reference differ by 1 nats"):
            fresh.compute_loss(fresh.model, wrong)
    broken = batch | {"ref_chosen_logps": batch["ref_chosen_logps"] * math.nan}
    with pytest.raises(RuntimeError, match="differ by nan nats"):
        fresh.compute_loss(fresh.model, broken)


def test_step_0_is_the_identity_under_every_norm(checkpoint, trainer, batch):
    for norm in ("per_token", "per_bit"):
        fresh = trainer(ImagePolicy.from_pretrained(checkpoint), norm)
        fresh.model.train()
        assert fresh.compute_loss(fresh.model, dict(batch)).item() == pytest.approx(math.log(2), abs=1e-5)


def test_margins_and_accuracies_are_measured_by_scale(trainer, shared_model, batch):
    built = trainer(shared_model)
    loss_of(built, batch)
    chosen, rejected = log_ratios(shared_model, batch)
    margins = [built.measured[f"rewards/margins/scale_{k}"][0] for k in range(len(SCHEDULE))]
    # fp32 sums over scales against one over all
    assert sum(margins) == pytest.approx(0.1 * (chosen - rejected).mean().item(), abs=1e-4)
    for side in ("chosen", "rejected"):
        assert all(0 <= built.measured[f"bit_accuracy/{side}/scale_{k}"][0] <= 1 for k in range(len(SCHEDULE)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beta": 0.0}, "beta=0"),
        ({"logp_norm": "mean"}, "logp_norm=mean"),
        ({"credit_alpha": -0.1}, "credit_alpha=-0.1: expected 0 or more"),
        ({"credit_scales": 0}, "credit_scales=0: expected 1 or more"),
        ({"loss_weights": [1.0, 2.0]}, "dpo.loss_weights"),
    ],
)
def test_impossible_dpo_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        parse(DpoConfig, wrong, "dpo")


@pytest.mark.parametrize("norm", ["sum", "per_token", "per_bit"])
@pytest.mark.parametrize(("alpha", "scales"), [(0.6, None), (0.0, 2), (1.0, 2)])
def test_step_0_is_the_identity_under_every_credit(checkpoint, chat, pairs, trainer, norm, alpha, scales):
    fresh = trainer(ImagePolicy.from_pretrained(checkpoint), norm, alpha, scales)
    fresh.model.train()
    batch = PairCollator(chat, scales)(pairs)
    assert fresh.compute_loss(fresh.model, dict(batch)).item() == pytest.approx(math.log(2), abs=1e-5)
    assert 0 <= fresh.step0_max_abs_logratio <= 1e-4
    wrong = batch | {"ref_by_scale": batch["ref_by_scale"] + 1.0}
    with pytest.raises(RuntimeError, match="DPO step 0"):
        fresh.compute_loss(fresh.model, wrong)


@pytest.mark.parametrize(("alpha", "scales"), [(0.6, None), (0.0, 2), (0.6, 2)])
def test_credit_weighs_policy_and_reference_by_scale(trainer, shared_model, chat, pairs, batch, alpha, scales):
    cut = PairCollator(chat, scales)(pairs)
    assert cut["bits"].shape[1] == token_count(SCHEDULE[:scales])
    with torch.no_grad():
        output = shared_model(**{key: batch[key] for key in ("input_ids", "attention_mask", "bits", "resolution")})
    ratios = weighted_sum(output.log_probs_BK - batch["ref_by_scale"], scale_credit(SCHEDULE, alpha, scales))
    chosen, rejected = ratios.chunk(2)
    expected = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean().item()
    assert loss_of(trainer(shared_model, alpha=alpha, scales=scales), cut).item() == pytest.approx(expected, abs=1e-5)
    assert loss_of(trainer(shared_model), batch).item() != pytest.approx(expected, abs=1e-5)


def test_logits_are_divided_by_the_temperature(shared_model, batch):
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "bits", "resolution")}
    with torch.no_grad():
        logits = Vargpt.forward(
            shared_model,
            batch["input_ids"],
            batch["attention_mask"],
            Drawing(Bits().replay(batch["bits"], SCHEDULE).inputs_BLd, (SIDE, SIDE)),
        ).image_logits
        expected = scale_sums(bit_log_probs(logits / 0.5, batch["bits"]), SCHEDULE)
        torch.testing.assert_close(shared_model(**inputs, tau=0.5).log_probs_BK, expected)
