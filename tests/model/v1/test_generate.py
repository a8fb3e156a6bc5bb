"""Drawing indices: what a sample depends on, how noise guides, and how codes are chosen."""

import pytest
import torch
from PIL import Image

from tests.helpers.tiny import V1_SIDES
from vargpt_rl.model import generate
from vargpt_rl.model.generate import SamplingConfig, draw_indices, generate_images
from vargpt_rl.model.noise import SeededNoise
from vargpt_rl.model.unified import replayed
from vargpt_rl.model.v1 import modeling

SIZE = (16 * V1_SIDES[-1],) * 2
TEXTS = ("a star", "two small blue squares above a large green triangle", "Please draw a red circle.")


def sample(model, chat, rows, seeds, sampling, vision=None):
    ids, mask = chat.pad(rows, "left"), chat.pad([[1] * len(row) for row in rows], "left", value=0)
    return generate_images(model, ids, mask, seeds, SIZE, sampling, *(vision or ()))


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_a_sample_depends_on_its_prompt_and_seed_and_not_on_its_neighbours(v1_model, v1_chat, guidance):
    sampling, seeds = SamplingConfig(cfg=guidance, tau=1.0, top_p=0.96), [5, 6, 7, 8]
    vision = v1_chat.vision_inputs([Image.new("RGB", (28, 28), "red")])
    rows = [v1_chat.drawing_prompt(text, "") for text in TEXTS]
    rows.append(v1_chat.drawing_prompt("Recolour it.", "Here:", vision.image_grid_thw))
    together = sample(v1_model, v1_chat, rows, seeds, sampling, vision)
    for i, (row, seed) in enumerate(zip(rows, seeds, strict=True)):
        alone = sample(v1_model, v1_chat, [row], [seed], sampling, vision if i == 3 else None)
        assert torch.equal(alone.labels_BLs[0], together.labels_BLs[i])
    other = sample(v1_model, v1_chat, rows, [seed + 10 for seed in seeds], sampling, vision)
    assert (other.labels_BLs != together.labels_BLs).flatten(1).any(1).all(), "another seed, another image"
    same_seed = sample(v1_model, v1_chat, rows[:3], [5, 5, 5], sampling)
    assert (same_seed.labels_BLs[0] != same_seed.labels_BLs[1]).any(), "another prompt, another image"


def test_the_latent_sum_is_that_of_the_indices(v1_model, v1_chat):
    drawn = sample(v1_model, v1_chat, [v1_chat.drawing_prompt("a star", "")], [0], SamplingConfig(cfg=0.0, tau=1.0))
    tokenizer = v1_model.image_tokenizer
    with torch.no_grad():
        again = tokenizer.replay(drawn.labels_BLs, tokenizer.schedule_for(*SIZE)).summed_Bdhw
    assert torch.equal(again, drawn.summed_Bdhw)


def test_indices_are_drawn_from_the_teacher_forced_logits(v1_model, v1_chat, monkeypatch):
    logits = []
    monkeypatch.setattr(generate, "draw_indices", lambda x, *rest: logits.append(x) or draw_indices(x, *rest))
    tau = 0.5
    rows = [v1_chat.drawing_prompt("a star", "Here:")]
    labels = sample(v1_model, v1_chat, rows, [3], SamplingConfig(cfg=0.0, tau=tau)).labels_BLs
    ids = torch.tensor([v1_chat.drawn("a star", "Here:", labels.shape[1]).ids])
    with torch.no_grad():
        forced = v1_model(ids, drawing=replayed(labels.clone(), SIZE)).image_logits
    # fp32: caches against one pass, at logits of a few units
    torch.testing.assert_close(torch.cat(logits, 1) * tau, forced, rtol=0, atol=5e-5)


def test_guidance_grows_from_none_at_the_first_scale_to_all_at_the_last(v1_model):
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    conditional, unconditional = logits
    for progress in (0.0, 0.25, 1.0):
        strength = 1.5 * progress
        expected = (1 + strength) * conditional - strength * unconditional
        torch.testing.assert_close(v1_model.guide(logits, 1.5, progress)[0], expected)


def test_the_noise_that_guides_is_standard_normal_and_the_samples_own(v1_model, v1_chat, monkeypatch):
    seen, gaussian = [], modeling.gaussian_states
    monkeypatch.setattr(modeling, "gaussian_states", lambda *args: seen.append(gaussian(*args)) or seen[-1])
    rows = [v1_chat.drawing_prompt(text, "") for text in TEXTS[:2]]
    sample(v1_model, v1_chat, rows, [1, 2], SamplingConfig(cfg=1.5, tau=1.0))
    together = torch.cat(seen, 1)
    seen.clear()
    sample(v1_model, v1_chat, rows[1:], [2], SamplingConfig(cfg=1.5, tau=1.0))
    assert torch.equal(torch.cat(seen, 1)[0], together[1])
    assert not torch.equal(together[0], together[1])
    assert abs(together.mean()) < 0.1 and abs(together.std() - 1) < 0.1
    seen.clear()
    sample(v1_model, v1_chat, rows, [1, 2], SamplingConfig(cfg=0.0, tau=1.0))
    assert not seen, "without guidance there is no noise"


def test_indices_have_the_probability_of_their_logits():
    noise = SeededNoise([0])
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = p.log().expand(1, 20000, 4)

    def shares(**how) -> list[float]:
        drawn = draw_indices(logits, SamplingConfig(**{"top_k": 4, "top_p": 1.0} | how), noise)
        return (drawn.flatten().bincount(minlength=4) / 20000).tolist()

    error = 0.018  # five standard errors
    assert shares() == pytest.approx(p.tolist(), abs=error)
    assert shares(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=error)
    # 0.5 and 0.8 are below 0.9, so the third is kept; 0.95 is not
    assert shares(top_p=0.9) == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], abs=error)
    assert shares(top_p=0.4) == [1.0, 0, 0, 0], "the likeliest is always kept"
    assert shares(top_k=1) == [1.0, 0, 0, 0]


def test_every_index_can_be_drawn_and_none_beyond():
    logits = torch.randn(3, 200, 7, generator=torch.Generator().manual_seed(0))
    noise = SeededNoise([0, 1, 2])
    drawn = draw_indices(logits, SamplingConfig(top_k=900, top_p=1.0), noise)
    assert drawn.shape == (3, 200, 1) and drawn.dtype == torch.int32
    assert drawn.unique().tolist() == list(range(7))
