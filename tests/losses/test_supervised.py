"""The supervised losses against plain cross entropies."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.helpers.tiny import BITS
from vargpt_rl.data.batches import DrawExample, SftCollator, TextExample
from vargpt_rl.data.samples import Prompt
from vargpt_rl.losses.supervised import (
    IMAGE_WEIGHT,
    Noise,
    forward_batch,
    image_loss,
    noisy_drawing,
    sft_loss,
    text_loss,
)
from vargpt_rl.model.bits import Bits
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.prompt import IGNORED, ChatFormat
from vargpt_rl.model.scales import scale_slices, schedule_for, token_count
from vargpt_rl.stages import NO_NOISE, STAGES

SCHEDULE = schedule_for(64)
TOKENS = token_count(SCHEDULE)


@pytest.fixture(scope="module")
def batch(checkpoint, model):
    """Two drawings and a question, rows of three lengths."""
    rng = np.random.default_rng(0)
    draw = [rng.standard_normal((BITS, 4, 4)).astype(np.float16) for _ in range(2)]
    examples = [
        DrawExample(Prompt("0", "a star", "Here:"), draw[0]),
        TextExample("How many circles are there?", "three"),
        DrawExample(Prompt("1", "two small blue squares"), draw[1]),
    ]
    return SftCollator(ChatFormat(checkpoint, model.config))(examples)


def test_text_loss_is_next_token_cross_entropy_over_the_labels():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, IGNORED, 3, 4, IGNORED], [IGNORED, IGNORED, IGNORED, IGNORED, 6]])
    log_p = logits.log_softmax(-1)
    expected = -(log_p[0, 1, 3] + log_p[0, 2, 4] + log_p[1, 3, 6]) / 3
    torch.testing.assert_close(text_loss(logits, labels), expected)


def test_image_loss_is_two_way_cross_entropy_over_all_bits():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, TOKENS, 2 * BITS, generator=generator)
    bits = torch.randint(0, 2, (2, TOKENS, BITS), generator=generator)
    expected = F.cross_entropy(logits.unflatten(-1, (BITS, 2)).flatten(0, 2), bits.flatten())
    torch.testing.assert_close(image_loss(logits, bits), expected)


def test_the_loss_is_the_weighted_sum_with_its_parts_as_metrics(model, batch):
    with torch.no_grad():
        output, bits = forward_batch(model, batch, NO_NOISE, text_logits=True)
        words, image = text_loss(output.logits, batch["labels"]), image_loss(output.image_logits, bits)
        for weight in (1.0, 0.25):
            loss, metrics = sft_loss(model, batch, NO_NOISE, weight)
            torch.testing.assert_close(loss, weight * words + IMAGE_WEIGHT * image)
            assert metrics["loss/text"] == pytest.approx(words.item())
            assert metrics["loss/image"] == pytest.approx(image.item())
    accuracies = [metrics[f"bit_accuracy/scale_{k}"] for k in range(len(SCHEDULE))]
    shares = [(at.stop - at.start) / TOKENS for at in scale_slices(SCHEDULE)]
    assert metrics["bit_accuracy"] == pytest.approx(np.dot(accuracies, shares), abs=1e-6)
    assert f"bit_accuracy/scale_{len(SCHEDULE)}" not in metrics
    assert metrics["tokens/image"] == 2 * TOKENS
    assert metrics["tokens/text"] == (batch["labels"] != IGNORED).sum(), "no row begins with a label"


def test_without_text_weight_the_text_head_is_not_run(model, batch):
    loss, metrics = sft_loss(model, batch, NO_NOISE, 0.0)
    assert "loss/text" not in metrics
    assert loss.item() == pytest.approx(IMAGE_WEIGHT * metrics["loss/image"])
    loss.backward()
    assert model.lm_head.weight.grad is None
    assert model.image_decoder.head.weight.grad.abs().max() > 0
    model.zero_grad(set_to_none=True)


def test_a_batch_of_words_has_no_image_loss(checkpoint, model):
    batch = SftCollator(ChatFormat(checkpoint, model.config))([TextExample("How many circles are there?", "three")])
    loss, metrics = sft_loss(model, batch, Noise(), 0.5)
    assert metrics.keys() == {"loss/text", "tokens/text"}
    assert metrics["tokens/text"] == (batch["labels"] != IGNORED).sum()
    assert loss.item() == pytest.approx(0.5 * metrics["loss/text"])


def test_without_noise_a_batch_has_one_loss_and_with_it_many(model, batch):
    def seen(noise: Noise) -> set[float]:
        torch.manual_seed(0)
        with torch.no_grad():
            return {sft_loss(model, batch, noise, 0.0)[0].item() for _ in range(4)}

    assert len(seen(NO_NOISE)) == 1
    for noise in (Noise(0.3, 0.0, 0.0), Noise(0.0, 0.5, 0.0), Noise(0.0, 0.0, 0.5)):
        assert len(seen(noise)) > 1, noise


def test_flips_are_drawn_image_by_image_below_the_bound():
    features = torch.zeros(64, BITS, 8, 8, dtype=torch.float16)
    features[:, 0] = 1  # bits of the first channel are 1 at every scale, the others 0, unless flipped earlier
    schedule = schedule_for(128)
    torch.manual_seed(0)
    truth = Bits().quantise_noisily(features.float(), schedule, flip=0.0)
    assert torch.equal(truth.inputs_BLd, Bits().quantise(features.float(), schedule).inputs_BLd)
    noisy = Bits().quantise_noisily(features.float(), schedule, flip=0.3)
    # The codes of scale 0 show in the first input of scale 1 (one cell resized is constant): count its flips.
    flipped = (noisy.inputs_BLd[:, 0] > 0) != (truth.inputs_BLd[:, 0] > 0)
    # mean 0.15 of 512 bits; images differ in their rate, which widens the standard error to about 0.02
    assert flipped.float().mean().item() == pytest.approx(0.15, abs=0.06)
    assert flipped.any(1).float().mean() < 1, "some images have few flips"


def test_rates_of_flips_are_uniform_below_the_bound_for_each_image_and_scale(monkeypatch):
    given = []
    monkeypatch.setattr(Bits, "quantise_flipped", lambda self, features, schedule, flip: given.append(flip))
    torch.manual_seed(0)
    Bits().quantise_noisily(torch.zeros(500, BITS, 4, 4), SCHEDULE, Noise().flip)
    Bits().quantise_noisily(torch.zeros(500, BITS, 4, 4), SCHEDULE, NO_NOISE.flip)
    (rates_NK,) = given
    assert rates_NK.shape == (500, len(SCHEDULE))
    assert 0 <= rates_NK.min() < 0.01 and 0.29 < rates_NK.max() <= 0.3
    # 1500 uniform rates: the mean's standard error is 0.3 / sqrt(12 x 1500) = 0.0022
    assert rates_NK.mean().item() == pytest.approx(0.15, abs=0.01)
    assert rates_NK.T.corrcoef().fill_diagonal_(0).abs().max() < 0.2, "scales have rates of their own"


@pytest.mark.parametrize(
    ("stage", "share", "drop_path"), [("sft", 0.1, 0.1), ("pretrain", 0.1, 0.0), ("sft_on_winners", 0.0, 0.0)]
)
def test_conditions_and_paths_are_dropped_as_the_stage_says(stage, share, drop_path):
    torch.manual_seed(0)
    features_Ndhw = torch.zeros(4000, BITS, 1, 1, dtype=torch.float16)
    drawing = noisy_drawing(features_Ndhw, STAGES[stage].noise, SimpleNamespace(image_tokenizer=Bits()))
    assert drawing.unconditional_N.dtype == torch.bool and drawing.unconditional_N.shape == (4000,)
    # four standard errors of 4000 images
    assert drawing.unconditional_N.float().mean().item() == pytest.approx(share, abs=0.02 if share else 0.0)
    assert drawing.drop_path == drop_path


def gradients_of(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss, _ = sft_loss(model, batch, NO_NOISE, 1.0)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal but for fp32 sums in another order."""
    assert len(expected) > 20
    for name, gradient in expected.items():
        scale = max(gradient.abs().max().item(), 1e-3)
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("drawn", [True, False])
def test_a_blank_image_reaches_the_vision_tower_and_nothing_else(checkpoint, chat, drawn):
    examples = [TextExample("How many?", "three"), TextExample("What?", "a star " * 9)]
    if drawn:
        features = np.random.default_rng(0).standard_normal((BITS, 4, 4)).astype(np.float16)
        examples.append(DrawExample(Prompt("0", "a star"), features))
    model = Vargpt.from_pretrained(checkpoint)
    plain, gradients = gradients_of(model, SftCollator(chat)(examples))
    assert not any(name.startswith("model.visual.") for name in gradients)
    blank, with_blank = gradients_of(model, SftCollator(chat, shows=True)(examples))
    torch.testing.assert_close(blank, plain, rtol=1e-6, atol=1e-6)
    assert_same_gradients(with_blank, gradients)
    seen = {name: gradient for name, gradient in with_blank.items() if name.startswith("model.visual.")}
    assert len(seen) > 5 and not any(gradient.any() for gradient in seen.values())
    shown = chat.vision_inputs([Image.new("RGB", (56, 56), "red")])
    examples[0] = TextExample("How many?", "three", shown)
    batch = SftCollator(chat, shows=True)(examples)
    assert len(batch["image_grid_thw"]) == 1 and "blocks" not in batch, "none is needed"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("alone", [True, False])
def test_texts_that_share_a_row_have_the_loss_and_gradients_of_rows_of_their_own(checkpoint, chat, alone, attention):
    words = ["three", "a large green triangle left of a yellow star " * 8, "blue", "two small squares", "red"]
    examples = [TextExample(f"What is number {i}?", word) for i, word in enumerate(words)]
    if not alone:
        shown = chat.vision_inputs([Image.new("RGB", (56, 56), "red")])
        features = np.random.default_rng(0).standard_normal((BITS, 4, 4)).astype(np.float16)
        examples[1:1] = [TextExample("What colour?", "red", shown), DrawExample(Prompt("0", "a star"), features, shown)]
    model = Vargpt.from_pretrained(checkpoint, attn_implementation=attention)
    batches = [SftCollator(chat, packs)(examples) for packs in (True, False)]
    assert ["blocks" in batch for batch in batches] == [True, False]
    assert len(batches[0]["input_ids"]) < len(batches[1]["input_ids"])
    (packed, packed_gradients), (plain, gradients) = (gradients_of(model, batch) for batch in batches)
    torch.testing.assert_close(packed, plain, rtol=1e-6, atol=1e-6)
    assert packed_gradients.keys() == gradients.keys()
    assert_same_gradients(packed_gradients, gradients)
