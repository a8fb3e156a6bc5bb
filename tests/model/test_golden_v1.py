"""Parity of v1 with stored outputs of the published code, on one tiny set of weights.

``VARGPT_GOLDEN_V1`` names the directory; every size and token id is read from its ``config.json``. Without the
directory these tests are skipped.

Stored rows serve as they are: the published v1 gives an image L positions, as this model does. Big tensors are stored
as strided subsets, with sums over the whole rows beside them.

Tolerances: fp32 on CPU, those that the data's notes suggest, at about ten times what the published code differs from
itself (one thread or two, fp32 or fp64). Logits of a guided drawing have twice the spread of plain ones.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil

from vargpt_rl.losses.supervised import image_loss, text_loss
from vargpt_rl.model import generate
from vargpt_rl.model.generate import SamplingConfig, to_uint8
from vargpt_rl.model.likelihood import image_log_probs, scale_sums, symbol_log_probs
from vargpt_rl.model.prompt import IGNORED
from vargpt_rl.model.scales import scale_slices
from vargpt_rl.model.unified import replayed
from vargpt_rl.model.v1 import modeling
from vargpt_rl.model.v1.configuration import VargptV1Config
from vargpt_rl.model.v1.image_tokenizer import conv_of_scale
from vargpt_rl.model.v1.modeling import VargptV1
from vargpt_rl.release.v1_names import from_release

GOLDEN = Path(os.environ.get("VARGPT_GOLDEN_V1", Path(__file__).parents[3] / "shared/golden/v1_tiny"))

pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"no golden data in {GOLDEN}; VARGPT_GOLDEN_V1 names another"
)

FEATURES = 2e-5
STATES = 5e-5
LOGITS = 2e-4
GENERATION_LOGITS = 3e-4
LOG_PROBS = 0.02  # a sum of L terms
LOSS = 1e-4
IMAGES = 1e-4
HALF = 5e-4  # stored as fp16, at values up to 1


def worst(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest absolute difference; the shapes must agree."""
    assert ours.shape == theirs.shape
    return (ours.double() - theirs.double()).abs().max().item()


def sums(ours_NLV: torch.Tensor, stored: dict[str, torch.Tensor], name: str) -> float:
    """Largest difference of whole rows, by their sum and sum of squares, per column."""
    found = ours_NLV.double()
    rows = found.sum(-1), found.square().sum(-1)
    pairs = zip(rows, (stored[f"{name}_rowsum_f64"], stored[f"{name}_rowsumsq_f64"]), strict=True)
    return max(worst(mine, theirs) for mine, theirs in pairs) / ours_NLV.shape[-1]


@pytest.fixture(scope="module")
def settings():
    return json.loads((GOLDEN / "config.json").read_text())


@pytest.fixture(scope="module")
def config(settings):
    llm, vision, decoder, vae, ids = (settings[key] for key in ("llm", "vision", "var", "vae", "special_ids"))
    return VargptV1Config(
        text_config={key: value for key, value in llm.items() if key != "rope_theta"}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": llm["rope_theta"]}}
        | {"pad_token_id": ids["pad"], "bos_token_id": ids["bos"], "eos_token_id": ids["eos"]},
        vision_config=dict(vision),
        decoder_config={
            "width": decoder["embed_dim"],
            "depth": decoder["depth"],
            "heads": decoder["num_heads"],
            "mlp_ratio": decoder["mlp_ratio"],
            "norm_eps": decoder["norm_eps"],
        },
        image_tokenizer_config={
            "codes": vae["vocab_size"],
            "latent_channels": vae["Cvae"],
            "sides": decoder["patch_nums"],
            "residual_convs": vae["share_quant_resi"],
            "residual_share": vae["quant_resi"],
            "base_channels": vae["ch"],
            "channel_multipliers": vae["ch_mult"],
            "blocks_per_level": vae["num_res_blocks"],
        },
        image_token_index=ids["image"],
        image_seq_length=settings["llava"]["image_tokens"],
        vision_feature_layer=settings["llava"]["vision_feature_layer"],
        **{f"image_gen_{key}_token_id": ids[f"image_gen_{key}"] for key in ("start", "end", "pad")},
    )


@pytest.fixture(scope="module")
def model(config):
    model = VargptV1(config).eval()
    released = {name: tensor.float() for name, tensor in load_file(GOLDEN / "weights.safetensors").items()}
    model.load_state_dict(from_release(released, config, list(model.state_dict())))
    return model


@pytest.fixture(scope="module")
def schedule(model, config):
    return model.image_tokenizer.schedule_for(16 * config.image_tokenizer_config.sides[-1])


@pytest.fixture(scope="module")
def tokenizer_data():
    return load_file(GOLDEN / "tokenizer.safetensors")


def test_scales_share_convolutions_as_published(settings):
    vae = settings["vae"]
    assert conv_of_scale(len(vae["phi_index_per_scale"]), vae["share_quant_resi"]) == vae["phi_index_per_scale"]


def test_images_become_the_same_indices_and_come_back(model, tokenizer_data):
    data = tokenizer_data
    with torch.no_grad():
        features = model.image_tokenizer.features(data["image"].float())
        encoded = model.image_tokenizer.encode(data["image"].float())
        image = model.image_tokenizer.decode(encoded.summed_Bdhw[:1])
    assert worst(features, data["raw_features"]) <= FEATURES
    assert torch.equal(encoded.labels_BLs[..., 0], data["idx"])
    assert worst(encoded.inputs_BLd, data["x_BLCv_wo_first_l"]) <= FEATURES
    assert worst(encoded.summed_Bdhw, data["f_hat"]) <= FEATURES
    assert worst(image[:, :, ::16], data["recon_0_rows_fp32"]) <= IMAGES
    assert worst(image, data["recon_0"]) <= HALF


def test_the_latent_sum_agrees_after_every_scale(model, schedule, tokenizer_data):
    tokenizer, labels = model.image_tokenizer, tokenizer_data["idx"][:1, :, None]
    summed = 0
    for k, at in enumerate(scale_slices(schedule)):
        with torch.no_grad():
            summed = summed + tokenizer.addend(labels[:, at], schedule, k, torch.float32)
        assert worst(summed[0], tokenizer_data["f_hat_after_each_scale_0"][k]) <= FEATURES, k


def test_stored_indices_are_replayed_to_the_same_inputs(model, schedule, tokenizer_data):
    with torch.no_grad():
        again = model.image_tokenizer.replay(tokenizer_data["idx"][..., None], schedule)
    assert worst(again.inputs_BLd, tokenizer_data["x_BLCv_wo_first_l"]) <= FEATURES
    assert worst(again.summed_Bdhw, tokenizer_data["f_hat"]) <= FEATURES


@pytest.fixture(scope="module")
def forward_data():
    return load_file(GOLDEN / "forward.safetensors")


class SeenBatch(NamedTuple):
    """A teacher-forced pass: its output and what went through its parts."""

    output: object
    parts: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def teacher_forced(model, schedule, forward_data):
    """The pass under the trained condition."""
    data, seen = forward_data, {}
    language, decoder = model.model.language_model, model.image_decoder
    hooks = [
        model.projector_in.register_forward_pre_hook(lambda module, args: seen.update(words=args[0])),
        language.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(embeds=kwargs["inputs_embeds"]), with_kwargs=True
        ),
        language.register_forward_hook(lambda module, args, out: seen.update(states=out[0])),
        decoder.register_forward_pre_hook(lambda module, args: seen.update(decoder=args[0])),
        decoder.blocks[-1].register_forward_hook(lambda module, args, out: seen.update(last=out)),
    ]
    labels, size = data["idx"][..., None], (16 * schedule[-1][0],) * 2
    with torch.no_grad():
        drawing = replayed(labels, size)(model)._replace(unconditional_N=torch.zeros(len(labels), dtype=torch.bool))
        output = model(data["input_ids"], data["attention_mask"], drawing)
    for hook in hooks:
        hook.remove()
    return SeenBatch(output, seen)


def test_the_condition_is_one_of_two_rows(model, forward_data):
    rows = torch.tensor([False, True])
    with torch.no_grad():
        rows_2C = model.image_decoder.class_embedding(rows.long())
    assert worst(rows_2C[0], forward_data["cond_BD"][0]) == 0
    assert worst(rows_2C[1], forward_data["null.cond_BD"][0]) == 0


def test_every_part_of_the_pass_agrees(teacher_forced, forward_data):
    data, parts = forward_data, teacher_forced.parts
    assert worst(parts["words"][:, ::8], data["var_input_sub"]) <= FEATURES
    assert worst(parts["embeds"][:, ::2], data["llm_inputs_embeds_sub"]) <= STATES
    real = data["attention_mask"][:, ::2].bool()
    assert worst(parts["states"][:, ::2][real], data["llm_hidden_sub"][real]) <= STATES
    assert worst(parts["decoder"][:, ::8], data["decoder_input_sub"]) <= STATES
    assert worst(parts["last"][:, ::8], data["decoder_output_sub"]) <= STATES


def test_text_logits_agree(teacher_forced, forward_data):
    real, logits = forward_data["attention_mask"].bool(), teacher_forced.output.logits
    assert worst(logits[..., ::4][real], forward_data["text_logits_sub"][real]) <= LOGITS
    assert worst(logits.logsumexp(-1)[real], forward_data["text_logits_lse"][real]) <= LOGITS
    assert torch.equal(logits.argmax(-1).int()[real], forward_data["text_logits_argmax"][real])


def test_image_logits_and_log_probs_agree(teacher_forced, schedule, forward_data):
    data, logits, labels = forward_data, teacher_forced.output.image_logits, forward_data["idx"][..., None]
    assert worst(logits[..., ::64], data["image_logits_sub"]) <= LOGITS
    assert worst(logits.logsumexp(-1), data["image_logits_lse"]) <= LOGITS
    assert worst(logits.gather(-1, labels.long())[..., 0], data["image_logits_at_label"]) <= LOGITS
    assert sums(logits, data, "image_logits") <= LOGITS
    assert torch.equal(logits.argmax(-1).int(), data["image_logits_argmax"])
    log_probs = symbol_log_probs(logits, labels)
    assert worst(image_log_probs(log_probs), data["image_logps_f64"]) <= LOG_PROBS
    assert worst(scale_sums(log_probs, schedule), data["image_logps_per_scale_f64"]) <= LOG_PROBS
    assert worst(image_loss(logits, labels)[None], data["image_loss"]) <= LOSS


def test_text_and_image_losses_add_up_as_published(model, config, schedule, forward_data, monkeypatch):
    """Published: every text token is a target, prompts and padding too, whose positions count on; equal weights."""
    data, labels = forward_data, forward_data["idx"][..., None]
    count_on = torch.arange(data["input_ids"].shape[1]).expand_as(data["input_ids"])
    # With the mask, unlike here, padding does not see the padding before it.
    monkeypatch.setattr(model, "layout", lambda ids, mask, *rest: (mask, count_on))
    with torch.no_grad():
        drawing = replayed(labels, (16 * schedule[-1][0],) * 2)(model)
        drawing = drawing._replace(unconditional_N=torch.zeros(len(labels), dtype=torch.bool))
        output = model(data["input_ids"], data["attention_mask"], drawing)
    targets = data["input_ids"].masked_fill(data["input_ids"] == config.image_gen_pad_token_id, IGNORED)
    words, image = text_loss(output.logits, targets), image_loss(output.image_logits, labels)
    assert worst(words[None], data["text_loss"]) <= LOSS
    assert worst((words + model.image_weight * image)[None], data["loss"]) <= LOSS


@pytest.mark.parametrize("explicit", [True, False])
def test_under_the_dropped_condition_logits_agree_and_it_is_what_drawing_uses(model, schedule, forward_data, explicit):
    data, labels = forward_data, forward_data["idx"][..., None]
    drawing = replayed(labels, (16 * schedule[-1][0],) * 2)
    if explicit:
        drawing = drawing(model)._replace(unconditional_N=torch.ones(len(labels), dtype=torch.bool))
    with torch.no_grad():
        logits = model(data["input_ids"], data["attention_mask"], drawing, text_logits=False).image_logits
    assert worst(logits[:, ::8, ::64], data["null.image_logits_sub"]) <= LOGITS
    assert worst(image_log_probs(symbol_log_probs(logits, labels)), data["null.image_logps_f64"]) <= LOG_PROBS


@pytest.fixture(scope="module")
def generate_data():
    return load_file(GOLDEN / "generate.safetensors")


@pytest.mark.parametrize("guidance", ["0", "1.5"])
def test_generation_draws_the_same_image(model, config, generate_data, monkeypatch, guidance):
    stored = {name.removeprefix(f"cfg{guidance}."): tensor for name, tensor in generate_data.items()}
    noise, drawn_so_far, logits, raw = stored["gaussian_noise"].float(), 0, [], []

    def stored_noise(like_BnH, how):
        nonlocal drawn_so_far
        at = slice(drawn_so_far, drawn_so_far := drawn_so_far + like_BnH.shape[1])
        return noise[:, at]

    def spy(logits_BnV, *how, draw=generate.draw_indices):
        logits.append(logits_BnV)
        return draw(logits_BnV, *how)

    monkeypatch.setattr(modeling, "gaussian_states", stored_noise)
    monkeypatch.setattr(generate, "draw_indices", spy)
    hook = model.image_decoder.register_forward_hook(lambda module, args, out: raw.append(out))
    start = torch.tensor([[config.image_gen_start_token_id]])
    ids = torch.cat([stored["prompt_ids"], start], dim=1)
    sampling = SamplingConfig(cfg=float(guidance), tau=1.0, top_k=1)
    drawn = generate.generate_images(model, ids, torch.ones_like(ids), [0], stored["image_uint8"].shape[:2], sampling)
    hook.remove()
    logits, raw = torch.cat(logits, 1), torch.cat(raw, 1)
    assert torch.equal(drawn.labels_BLs[..., 0], stored["idx"])
    assert worst(logits[..., ::64], stored["logits_sub"]) <= GENERATION_LOGITS
    assert worst(logits.logsumexp(-1), stored["logits_lse"]) <= GENERATION_LOGITS
    assert worst(logits.amax(-1), stored["logits_top1"]) <= GENERATION_LOGITS
    assert worst(drawn.summed_Bdhw, stored["f_hat"]) <= FEATURES
    if guidance != "0":
        assert worst(raw[:1, :, ::64], stored["raw_cond_logits_sub"]) <= LOGITS
        assert worst(raw[1:, :, ::64], stored["raw_uncond_logits_sub"]) <= LOGITS
        assert worst(raw[1:].logsumexp(-1), stored["raw_uncond_logits_lse"]) <= LOGITS
    with torch.no_grad():
        image = model.image_tokenizer.decode(drawn.summed_Bdhw)
    if guidance != "0":
        assert worst(image[:, :, ::16], stored["image_rows_fp32"]) <= IMAGES
    # The published code truncates, this one rounds: at most one step of 256 apart.
    assert worst(to_uint8(image)[0], stored["image_uint8"]) <= 1


@pytest.fixture(scope="module")
def understanding_data():
    return load_file(GOLDEN / "understanding.safetensors")


def test_understanding_is_llava(model, settings, understanding_data):
    data, side = understanding_data, settings["vision"]["image_size"]
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    pixels = processor(images=list(data["image_uint8"].numpy()), return_tensors="pt")["pixel_values"]
    assert worst(pixels, data["pixel_values"]) <= FEATURES
    with torch.no_grad():
        assert worst(model.image_features(data["pixel_values"]), data["image_features"][0]) <= STATES
        logits = model(data["input_ids"], data["attention_mask"], pixel_values=data["pixel_values"]).logits
        both = model(data["batch2.input_ids"], data["batch2.attention_mask"], pixel_values=data["batch2.pixel_values"])
    assert worst(logits, data["logits"]) <= LOGITS
    real = data["batch2.attention_mask"].bool()
    assert worst(both.logits[real], data["batch2.logits_with_mask_positions"][real]) <= LOGITS
    embeds = model.embed(data["input_ids"], data["pixel_values"])
    hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=data["attention_mask"])[0]
    assert worst(hidden, data["llm_hidden"]) <= STATES


@pytest.mark.parametrize("batch", ["", "batch2."])
def test_greedy_answers_are_the_same(model, understanding_data, batch):
    data = {name: understanding_data[batch + name] for name in ("input_ids", "attention_mask", "pixel_values")}
    expected = understanding_data[f"{batch}greedy_ids"]
    new = expected.shape[1] - data["input_ids"].shape[1]
    answer = model.generate(**data, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    assert torch.equal(answer, expected)
