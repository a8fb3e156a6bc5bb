"""Drawing: what a sample depends on, and what it must not depend on."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.tiny import BITS
from vargpt_rl.model import generate, modeling
from vargpt_rl.model.bits import Bits
from vargpt_rl.model.generate import SamplingConfig, draw_bits, generate_images, to_images, to_uint8
from vargpt_rl.model.noise import SeededNoise
from vargpt_rl.model.scales import schedule_for, token_count
from vargpt_rl.model.unified import Drawing

SIZE = (64, 64)
SCHEDULE = schedule_for(*SIZE)
TEXTS = ("a star", "two small blue squares above a large green triangle", "Please draw a red circle.")


@pytest.fixture(scope="module")
def images(chat):
    return chat.vision_inputs([Image.new("RGB", (56, 56), "red")])


def sample(model, chat, rows, seeds, sampling, images=None, size=SIZE):
    ids, mask = chat.pad(rows, "left"), chat.pad([[1] * len(row) for row in rows], "left", value=0)
    return generate_images(model, ids, mask, seeds, size, sampling, *(images or ()))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_sample_depends_on_its_prompt_and_seed_and_not_on_its_neighbours(model, chat, images, guidance):
    sampling, seeds = SamplingConfig(cfg=guidance, tau=1.0), [5, 6, 7, 8]
    rows = [chat.drawing_prompt(text, "") for text in TEXTS]
    rows.append(chat.drawing_prompt("Recolour it.", "Here:", images.image_grid_thw))
    assert len({len(row) for row in rows}) == len(rows)
    together = sample(model, chat, rows, seeds, sampling, images)
    assert together.labels_BLs.shape == (4, token_count(SCHEDULE), BITS)
    for i, (row, seed) in enumerate(zip(rows, seeds, strict=True)):
        alone = sample(model, chat, [row], [seed], sampling, images if i == 3 else None)
        assert torch.equal(alone.labels_BLs[0], together.labels_BLs[i])
    other = sample(model, chat, rows, [seed + 10 for seed in seeds], sampling, images)
    assert (other.labels_BLs != together.labels_BLs).flatten(1).any(1).all(), "another seed, another image"
    same_seed = sample(model, chat, rows[:3], [5, 5, 5], sampling)
    assert (same_seed.labels_BLs[0] != same_seed.labels_BLs[1]).any(), "another prompt, another image"


def test_the_latent_sum_is_that_of_the_bits(model, chat):
    drawn = sample(model, chat, [chat.drawing_prompt("a star", "")], [0], SamplingConfig(), size=(96, 48))
    assert torch.equal(Bits().replay(drawn.labels_BLs, schedule_for(96, 48)).summed_Bdhw, drawn.summed_Bdhw)


@pytest.mark.parametrize("seen", [False, True])
def test_bits_are_drawn_from_the_teacher_forced_logits(model, chat, images, monkeypatch, seen):
    logits = []
    monkeypatch.setattr(generate, "draw_bits", lambda x, *rest: logits.append(x) or draw_bits(x, *rest))
    given, grid = (images, images.image_grid_thw) if seen else (None, None)
    tau = 0.5
    rows = [chat.drawing_prompt("a star", "Here:", grid)]
    bits = sample(model, chat, rows, [3], SamplingConfig(cfg=1.0, tau=tau), given).labels_BLs
    ids = torch.tensor([chat.drawn("a star", "Here:", token_count(SCHEDULE), grid).ids])
    with torch.no_grad():
        forced = model(
            ids, drawing=Drawing(Bits().replay(bits, SCHEDULE).inputs_BLd, SIZE), **(given._asdict() if given else {})
        ).image_logits
    # fp32: caches against one pass, at logits of a few units
    torch.testing.assert_close(torch.cat(logits, 1) * tau, forced, rtol=0, atol=5e-5)


@pytest.mark.parametrize("seen", [False, True])
def test_guidance_in_one_pass_is_guidance_in_two(model, chat, images, monkeypatch, seen):
    given, grid = (images, images.image_grid_thw) if seen else (None, None)
    rows = [chat.drawing_prompt("a star", "Here:", grid)]
    rows += [] if seen else [chat.drawing_prompt(TEXTS[1], "")]
    drawn = []
    for most in (0, 4, 1000):
        monkeypatch.setattr(modeling, "MERGED_TOKENS", most)
        drawn.append(sample(model, chat, rows, [3, 4][: len(rows)], SamplingConfig(cfg=3.0, tau=1.0), given))
    for other in drawn[1:]:
        assert torch.equal(other.labels_BLs, drawn[0].labels_BLs)
        torch.testing.assert_close(other.log_probs_BK, drawn[0].log_probs_BK, rtol=0, atol=1e-3)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_top_k_1_leaves_nothing_to_the_seed(model, chat, guidance):
    rows = [chat.drawing_prompt("a star", "")] * 2
    bits = sample(model, chat, rows, [1, 2], SamplingConfig(cfg=guidance, top_k=1)).labels_BLs
    assert torch.equal(bits[0], bits[1])


def test_images_are_completed_from_their_first_scales(model, chat):
    sampling = SamplingConfig(cfg=1.0, tau=1.0)
    rows = [chat.drawing_prompt("a red circle", "Here:")] * 2
    first = sample(model, chat, rows, [5, 6], sampling)
    schedule = model.image_tokenizer.schedule_for(*SIZE)
    at = token_count(schedule[:2])
    ids, mask = chat.pad(rows, "left"), chat.pad([[1] * len(row) for row in rows], "left", value=0)
    given_BLs = first.labels_BLs[:, :at]
    other = generate_images(model, ids, mask, [7, 8], SIZE, sampling, given_BLs=given_BLs)
    assert torch.equal(other.labels_BLs[:, :at], given_BLs) and not torch.equal(other.labels_BLs, first.labels_BLs)
    torch.testing.assert_close(other.log_probs_BK[:, :2], first.log_probs_BK[:, :2])


def test_prompts_longer_than_the_unconditional_rows_work_with_guidance(model, chat):
    rows = [chat.drawing_prompt(text, "") for text in ("a large green triangle left of a yellow star. " * 20, "?")]
    unconditional = model.config.decoder_config.max_unconditional
    assert len(rows[0]) > unconditional > len(rows[1])
    sampling = SamplingConfig(cfg=3.0)
    contexts = []
    hook = model.image_decoder.register_forward_pre_hook(lambda module, args: contexts.append(args[2]))
    together = sample(model, chat, rows, [1, 2], sampling).labels_BLs
    hook.remove()
    seen = [len(row) - 1 for row in rows]  # all but image_gen_start
    assert contexts[0].mask_NT.sum(1).tolist() == [*seen, unconditional, seen[1]]
    for i, seed in enumerate([1, 2]):
        assert torch.equal(sample(model, chat, rows[i : i + 1], [seed], sampling).labels_BLs[0], together[i])


def test_bits_have_the_probability_of_their_logits():
    noise = SeededNoise([0, 1])
    logits = torch.zeros(2, 5000, 2)
    logits[0, :, 1] = torch.tensor(0.8 / 0.2).log()
    logits[1, :, 1] = torch.tensor(0.98 / 0.02).log()
    share = draw_bits(logits, SamplingConfig(top_p=1.0), noise).float().mean((1, 2))
    # five standard errors of 5000 draws
    assert share.tolist() == [pytest.approx(0.8, abs=0.028), pytest.approx(0.98, abs=0.01)]
    share = draw_bits(logits, SamplingConfig(top_p=0.97), noise).float().mean((1, 2))
    assert share.tolist() == [pytest.approx(0.8, abs=0.028), 1.0], "top_p drops the weaker option at 0.03 or below"
    assert (draw_bits(logits, SamplingConfig(top_k=1), noise) == 1).all()


def test_images_become_bytes():
    image = torch.tensor([-1.0, 0.0, 1.0])[None, :, None, None].expand(1, 3, 2, 4)
    pixels = to_uint8(image)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (1, 2, 4, 3)
    assert pixels[0, 0, 0].tolist() == [0, 128, 255]


def test_latent_sums_become_images(model):
    summed = torch.randn(2, BITS, 4, 3, generator=torch.Generator().manual_seed(0))
    images = to_images(model, summed)
    assert [image.size for image in images] == [(48, 64)] * 2
    for image, latent in zip(images, summed, strict=True):
        with torch.no_grad():
            pixels = to_uint8(model.image_tokenizer.decode(latent[None]))[0]
        assert np.array_equal(np.asarray(image), pixels)


def test_images_decode_alike_in_any_batch(model):
    summed = torch.randn(3, BITS, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        batch = model.image_tokenizer.decode(summed)
        assert torch.equal(batch[1:2], model.image_tokenizer.decode(summed[1:2]))
        plain = model.image_tokenizer.decoder(summed).clamp(-1, 1)
    torch.testing.assert_close(batch, plain, atol=1e-5, rtol=0)


def test_what_cannot_be_drawn_is_refused(model, chat):
    prompt = chat.drawing_prompt("a star", "")
    with pytest.raises(ValueError, match="2 seeds for 1 prompts"):
        sample(model, chat, [prompt], [1, 2], SamplingConfig())
    with pytest.raises(ValueError, match="must end with image_gen_start"):
        sample(model, chat, [prompt[:-1]], [1], SamplingConfig())
    with pytest.raises(ValueError, match="positive multiple of 16"):
        sample(model, chat, [prompt], [1], SamplingConfig(), size=(64, 60))


@pytest.mark.parametrize("wrong", [{"tau": 0.0}, {"tau": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"sampling.{next(iter(wrong))}="):
        SamplingConfig(**wrong)
