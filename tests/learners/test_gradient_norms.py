"""Gradient norms by modality: autograd's, whatever the micro-batches and ranks, and no trace of them in training."""

from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from learners import rank, sft
from learners.config import LearnerConfig, Recipe
from learners.gradient_norms import ModalityGradients
from tests.helpers.forks import ForkedRanks
from tests.helpers.streams import corpus_of, sft_job
from tests.helpers.tiny import BITS
from vargpt_rl.data.samples import ImageQuestion, Probe, Prompt
from vargpt_rl.losses.supervised import modality_losses
from vargpt_rl.model.bits import pack
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.scales import schedule_for, token_count
from vargpt_rl.stages import NO_NOISE, STAGES, freeze
from vargpt_rl.storage.checkpoint import Policy, check_checkpoint

SIDE = 32
TOKENS = token_count(schedule_for(SIDE))
STAGE = STAGES["understanding"]
QUESTIONS = [
    ImageQuestion("red", "What colour is the square?", "red"),
    ImageQuestion("blue", "How many circles are there?", "three"),
]
RECIPE = Recipe(steps=2, batch=16, micro_batch=4, lr=1e-3, warmup_ratio=0.0)
PROBE = Probe(Prompt("p", "a star"), pack(np.zeros((TOKENS, BITS), np.uint8)), SIDE)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    features = np.random.default_rng(0).standard_normal((12, BITS, SIDE // 16, SIDE // 16))
    return corpus_of(tmp_path_factory.mktemp("corpus"), features, QUESTIONS)


def batches(corpus, chat) -> list[dict]:
    """The micro-batches of the first step of ``RECIPE``, of both ranks."""
    mixtures = [corpus.mixture(chat, RECIPE.micro_batch, 0, rank, 2) for rank in range(2)]
    return [batch for mixture in mixtures for batch in islice(mixture, 2)]


@pytest.fixture(scope="module")
def expected(corpus, chat, checkpoint) -> dict[str, float]:
    """The norms of each loss and of their sum, by ``backward`` alone, and the tokens of each kind."""
    model, found, labelled, images = Vargpt.from_pretrained(checkpoint).train(), {}, 0, 0
    freeze(model, STAGE)
    for wanted in ({"text"}, {"image"}, {"text", "image"}):
        model.zero_grad(set_to_none=True)
        for batch in batches(corpus, chat):
            losses, metrics = modality_losses(model, batch, NO_NOISE, STAGE.text_weight)
            sum(loss for modality, loss in losses.items() if modality in wanted).backward()
            labelled, images = labelled + metrics["tokens/text"] / 3, images + metrics["tokens/image"] / 3
        gradients = [p.grad / 4 for p in model.parameters() if p.grad is not None]
        found["/".join(["grad_norm", *wanted]) if len(wanted) == 1 else "grad_norm"] = (
            torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt().item()
        )
    return found | {"tokens/text": labelled, "tokens/image": images}


def test_norms_are_autograds(corpus, chat, checkpoint, expected):
    model = Vargpt.from_pretrained(checkpoint).train()
    freeze(model, STAGE)
    gradients = ModalityGradients(model, micro_batches=4)
    for again in range(2):
        for batch in batches(corpus, chat):
            gradients.add(modality_losses(model, batch, NO_NOISE, STAGE.text_weight)[0])
        norms = gradients.norms()
        for modality in ("text", "image"):
            assert norms[modality] == pytest.approx(expected[f"grad_norm/{modality}"], rel=1e-5), again
    assert all(parameter.grad is None for parameter in model.parameters())
    assert norms["text"] != pytest.approx(norms["image"], rel=0.05)


def test_norms_are_the_same_with_gradient_checkpointing(corpus, chat, checkpoint, expected):
    model = Vargpt.from_pretrained(checkpoint).train()
    freeze(model, STAGE)
    model.gradient_checkpointing_enable()
    gradients = ModalityGradients(model, micro_batches=4)
    for batch in batches(corpus, chat):
        gradients.add(modality_losses(model, batch, NO_NOISE, STAGE.text_weight)[0])
    for modality, norm in gradients.norms().items():
        assert norm == pytest.approx(expected[f"grad_norm/{modality}"], rel=1e-5)


def measure(every: int, quiet: bool) -> None:
    """Have this process's rank measure every ``every``-th step, and without noise if it is to be quiet."""
    sft.EVERY = every
    rank.STAGES = {"understanding": replace(STAGE, noise=NO_NOISE)} if quiet else STAGES


@pytest.fixture(scope="module")
def trained(checkpoint, corpus, tmp_path_factory):
    """Trains on two ranks; the log and the weights."""

    def train(every: int, quiet: bool, zero: int) -> tuple[list[dict], dict[str, torch.Tensor]]:
        lines, folder = [], tmp_path_factory.mktemp("out")
        recipe = replace(RECIPE, zero=zero)
        job = sft_job("understanding", Policy(str(checkpoint)), corpus, recipe, folder, PROBE)
        with ForkedRanks(LearnerConfig(ranks=2), prepare=partial(measure, every, quiet)) as ranks:
            ranks.run(job, lines.append)
        return [line for line in lines if "loss" in line], load_file(check_checkpoint(folder / "final"))

    return train


def test_norms_are_those_of_the_batch_of_all_ranks(trained, expected):
    first, second = trained(every=1, quiet=True, zero=2)[0]
    for key, value in expected.items():  # DeepSpeed's own norm of the sum among them
        assert first[key] == pytest.approx(value, rel=1e-4), key
    assert second["grad_norm/text"] != first["grad_norm/text"]


def test_zero_3_trains_without_them(trained, expected):
    first, _ = trained(every=1, quiet=True, zero=3)[0]
    assert first["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert not any(key.startswith("grad_norm/") for key in first)


def test_measuring_does_not_change_training(trained):
    every, measured = trained(every=1, quiet=False, zero=2)
    now_and_then, unmeasured = trained(every=2, quiet=False, zero=2)
    assert [line["loss"] for line in every] == [line["loss"] for line in now_and_then]
    assert all(torch.equal(measured[name], unmeasured[name]) for name in measured)
    assert ["grad_norm/image" in line for line in now_and_then] == [True, False]
