"""The supervised losses of v1: cross entropy over the codebook, without bit flips."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.helpers.tiny import V1_SIDES
from vargpt_rl.data.batches import DrawExample, SftCollator, TextExample
from vargpt_rl.data.samples import Prompt
from vargpt_rl.losses.supervised import Noise, forward_batch, sft_loss
from vargpt_rl.stages import NO_NOISE

SIDE = 16 * V1_SIDES[-1]
PROMPT = Prompt("p", "a red circle", "Here:")


@pytest.fixture(scope="module")
def batch(v1_chat):
    """Two drawings and a question."""
    rng, draw = np.random.default_rng(0), []
    for text in ("a star", "two small blue squares"):
        features = rng.standard_normal((8, *[V1_SIDES[-1]] * 2)).astype(np.float16)
        draw.append(DrawExample(Prompt("0", text, "Here:"), features))
    return SftCollator(v1_chat)([draw[0], TextExample("How many circles are there?", "three"), draw[1]])


def test_the_loss_is_cross_entropy_over_the_codebook_with_equal_weights(v1_model, batch):
    with torch.no_grad():
        output, labels = forward_batch(v1_model, batch, NO_NOISE, text_logits=True)
        loss, metrics = sft_loss(v1_model, batch, NO_NOISE, 1.0)
        features = batch["features"].float()
        expected = v1_model.image_tokenizer.quantise(features, v1_model.image_tokenizer.schedule_for(SIDE)).labels_BLs
    assert torch.equal(labels, expected)
    image = F.cross_entropy(output.image_logits.flatten(0, 1), labels.flatten().long())
    assert metrics["loss/image"] == pytest.approx(image.item(), abs=1e-5)
    assert loss.item() == pytest.approx(metrics["loss/text"] + metrics["loss/image"], abs=1e-5)
    hits = (output.image_logits.argmax(-1) == labels[..., 0]).float()
    assert metrics["index_accuracy"] == pytest.approx(hits.mean().item())
    assert {f"index_accuracy/scale_{k}" for k in range(len(V1_SIDES))} <= metrics.keys()


def test_indices_are_never_flipped_but_conditions_and_paths_are_dropped(v1_model, batch):
    def losses(noise: Noise) -> set[float]:
        torch.manual_seed(0)
        with torch.no_grad():
            return {sft_loss(v1_model, batch, noise, 0.0)[0].item() for _ in range(4)}

    assert len(losses(Noise(0.9, 0.0, 0.0))) == 1
    for noise in (Noise(0.0, 0.5, 0.0), Noise(0.0, 0.0, 6.0)):  # a rate of 0.5 in a decoder of 2 blocks
        assert len(losses(noise)) > 1, noise


def test_supervised_training_conditions_as_published_and_scoring_as_drawing_does(v1_model, batch):
    with torch.no_grad():
        supervised = forward_batch(v1_model, batch, NO_NOISE, text_logits=False)[0].image_logits
        dropped = forward_batch(v1_model, batch, Noise(0.0, 1.0, 0.0), text_logits=False)[0].image_logits
    assert (supervised - dropped).abs().max() > 1e-3


def test_no_loss_reaches_what_is_left_out(v1_model, v1_chat):
    shown = v1_chat.vision_inputs([Image.new("RGB", (28, 28), "red")])
    features = np.random.default_rng(0).standard_normal((8, *[V1_SIDES[-1]] * 2)).astype(np.float16)
    batch = SftCollator(v1_chat)([DrawExample(PROMPT, features, shown)])
    v1_model.requires_grad_(True)
    sft_loss(v1_model, batch, NO_NOISE, 1.0)[0].backward()
    idle = {name for name, p in v1_model.named_parameters() if p.grad is None and "image_tokenizer." not in name}
    assert idle == {name for name, _ in v1_model.named_parameters() if name.startswith(v1_model.unreached)}
    v1_model.zero_grad(set_to_none=True)
