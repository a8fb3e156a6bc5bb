"""Parity with stored outputs of the published code, on one tiny set of weights.

``VARGPT_GOLDEN`` names the directory; every size and token id is read from its ``config.json``, so another directory
of the same files will do. Without the directory these tests are skipped.

What is compared of a teacher-forced pass: the published code gives an image Lp positions (L rounded up to a multiple
of 128), our rows have L. The stored rows are cut to the first L of them and right-padded to a common length. Everything
up to the last image token is compared: states, context, logits, log-probabilities. Nothing of it can differ, for the
language model is causal and the surplus pads come after all L image tokens; only the two or three tokens that follow
them see another past, and those serve no image.

Tolerances: fp32 on CPU, where the two sides differ by the order of additions. Features accumulate about 5e-6 (the
published code between one thread and two), a deep stack of layers up to 1e-4 at values of a few units; generation
logits are guided and divided by tau, hence some six times larger.
"""

import copy
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vargpt_rl.losses.supervised import image_loss
from vargpt_rl.model import generate
from vargpt_rl.model.bits import Bits
from vargpt_rl.model.configuration import VargptConfig
from vargpt_rl.model.generate import SamplingConfig, to_uint8
from vargpt_rl.model.likelihood import bit_log_probs, image_log_probs
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.scales import schedule_for
from vargpt_rl.model.unified import Drawing
from vargpt_rl.release.v1_1_names import from_release, our_name

GOLDEN = Path(os.environ.get("VARGPT_GOLDEN", Path(__file__).parents[3] / "shared/golden/v1_1_tiny"))

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden data in {GOLDEN}; VARGPT_GOLDEN names another")

FEATURES = 2e-5
STATES = 1e-4
LOGITS = 1e-4
GENERATION_LOGITS = 5e-4
HALF = 5e-4  # relative; stored as fp16
LOG_PROBS = 0.05  # a sum of L x d terms; the stored one was taken in fp32, whose spacing there is 1e-3
LOSS = 1e-4
IMAGES = 1e-4


def worst(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest absolute difference; the shapes must agree."""
    assert ours.shape == theirs.shape
    return (ours.double() - theirs.double()).abs().max().item()


def half_or(tolerance: float, stored: torch.Tensor) -> float:
    return HALF * max(1.0, stored.abs().max().item()) if stored.dtype == torch.float16 else tolerance


@pytest.fixture(scope="module")
def settings():
    return json.loads((GOLDEN / "config.json").read_text())


@pytest.fixture(scope="module")
def config(settings):
    llm, vision, decoder, vae, ids = (settings[k] for k in ("llm", "vision", "decoder", "vae", "special_ids"))
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    more = ("vocab_size", "rms_norm_eps", "max_position_embeddings")
    seen = ("depth", "embed_dim", "num_heads", "mlp_ratio", "patch_size", "spatial_merge_size", "temporal_patch_size")
    rope = {"rope_type": "default", "rope_theta": llm["rope_theta"], "mrope_section": llm["mrope_section"]}
    return VargptConfig(
        text_config={key: llm[key] for key in (*sizes, *more)}
        | {"rope_parameters": rope, "bos_token_id": None}
        | {"pad_token_id": ids["endoftext"], "eos_token_id": ids["im_end"]},
        vision_config={key: vision[key] for key in (*seen, "in_channels")} | {"hidden_size": vision["out_hidden_size"]},
        decoder_config={
            "width": decoder["embed_dim"],
            "depth": decoder["depth"],
            "heads": decoder["num_heads"],
            "mlp_ratio": decoder["mlp_ratio"],
            "max_scales": decoder["lvl_embed_rows"],
            "max_unconditional": decoder["text_maxlen"],
            "norm_eps": decoder["norm_eps"],
        },
        image_tokenizer_config={
            "bits": vae["codebook_dim"],
            "base_channels": vae["base_ch"],
            "channel_multipliers": vae["ch_mult"],
            "blocks_per_level": vae["num_res_blocks"],
        },
        tie_word_embeddings=llm["tie_word_embeddings"],
        **{f"{key}_token_id": ids[key] for key in ("vision_start", "vision_end")},
        **{f"image_gen_{key}_token_id": ids[f"image_gen_{key}"] for key in ("start", "end", "pad")},
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
    )


@pytest.fixture(scope="module")
def blocks_per_chunk(settings):
    return settings["decoder"]["depth"] // settings["decoder"]["block_chunks"]


@pytest.fixture(scope="module")
def model(config, blocks_per_chunk):
    model = Vargpt(config).eval()
    released = {name: tensor.float() for name, tensor in load_file(GOLDEN / "weights.safetensors").items()}
    model.load_state_dict(from_release(released, config, blocks_per_chunk))
    return model


@pytest.fixture(scope="module")
def tokenizer_data():
    return load_file(GOLDEN / "tokenizer.safetensors")


class Rows(NamedTuple):
    """Stored rows without the surplus pads, and the stored position of each first image token."""

    ids: torch.Tensor
    mask: torch.Tensor
    first_B: list[int]


def cut(ids_BT: torch.Tensor, mask_BT: torch.Tensor, config: VargptConfig, tokens: int) -> Rows:
    rows, first = [], []
    for ids_T, mask_T in zip(ids_BT, mask_BT, strict=True):
        pads = ((ids_T == config.image_gen_pad_token_id) & mask_T.bool()).nonzero()[:, 0]
        keep_T = mask_T.bool()
        keep_T[pads[tokens:]] = False
        rows.append(ids_T[keep_T])
        first.append(int(pads[0]))
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(rows, batch_first=True, padding_value=config.text_config.pad_token_id)
    return Rows(ids, pad([torch.ones_like(row) for row in rows], batch_first=True), first)


@pytest.mark.parametrize("side", [256, pytest.param(512, marks=pytest.mark.slow)])
def test_images_become_the_same_bits_and_come_back(model, tokenizer_data, side):
    image = tokenizer_data[f"image_{side}"].float()
    with torch.no_grad():
        features = model.image_tokenizer.features(image)
        encoded = model.image_tokenizer.encode(image)
        original = model.image_tokenizer.decode(encoded.summed_Bdhw)
    assert worst(features, tokenizer_data[f"raw_features_{side}"]) <= FEATURES
    assert torch.equal(encoded.labels_BLs, tokenizer_data[f"gt_BL_{side}"])
    inputs, recon = tokenizer_data[f"x_BLC_wo_prefix_{side}"], tokenizer_data[f"recon_{side}"]
    assert worst(encoded.inputs_BLd, inputs) <= half_or(FEATURES, inputs)
    assert worst(encoded.summed_Bdhw, tokenizer_data[f"summed_codes_{side}"]) <= FEATURES
    assert worst(original, recon) <= half_or(IMAGES, recon)


@pytest.fixture(scope="module")
def forward_data():
    return load_file(GOLDEN / "forward.safetensors")


@pytest.fixture(scope="module")
def teacher_forced(model, config, forward_data):
    """One right-padded batch: the output, what the decoder was given, and the language model's states."""
    bits = forward_data["image_gen_labels"]
    size = tuple(forward_data["pixel_gen_values"].shape[-2:])
    rows = cut(forward_data["input_ids"], forward_data["attention_mask"], config, bits.shape[1])
    seen = {}
    hooks = [
        model.image_decoder.register_forward_pre_hook(lambda module, args: seen.update(decoder=args)),
        model.model.language_model.register_forward_hook(lambda module, args, out: seen.update(states=out[0])),
    ]
    with torch.no_grad():
        output = model(rows.ids, rows.mask, Drawing(Bits().replay(bits, schedule_for(*size)).inputs_BLd, size))
    for hook in hooks:
        hook.remove()
    return rows, output, seen["decoder"], seen["states"]


def test_inputs_rebuilt_from_bits_are_those_of_the_pass(forward_data):
    bits = forward_data["image_gen_labels"]
    inputs = Bits().replay(bits, schedule_for(*forward_data["pixel_gen_values"].shape[-2:])).inputs_BLd
    assert worst(inputs, forward_data["x_BLC_wo_prefix"]) <= FEATURES


def test_language_states_agree_on_prompts_and_image_tokens(model, forward_data, teacher_forced):
    rows, output, _, states_BTH = teacher_forced
    tokens = forward_data["image_gen_labels"].shape[1]
    for b, first in enumerate(rows.first_B):
        for at in (slice(0, first), slice(first, first + tokens)):
            assert worst(states_BTH[b, at], forward_data["llm_hidden"][b, at]) <= STATES
            assert worst(output.logits[b, at], forward_data["text_logits"][b, at]) <= LOGITS


def test_the_decoder_is_given_the_same(forward_data, teacher_forced):
    y_BLC, condition, context = teacher_forced[2][:3]
    tokens = forward_data["image_gen_labels"].shape[1]
    assert worst(y_BLC, forward_data["decoder_input"][:, :tokens]) <= STATES
    assert worst(condition.modulation_N16C, forward_data["cond_gss"]) <= STATES
    lengths = forward_data["ca_cu_seqlens"].diff().tolist()
    assert context.mask_NT.sum(1).tolist() == lengths
    for b, stored in enumerate(forward_data["ca_kv"].split(lengths)):
        assert worst(context.states_NTC[b][context.mask_NT[b]], stored) <= STATES


def test_image_logits_and_log_probs_agree(forward_data, teacher_forced):
    logits, bits = teacher_forced[1].image_logits, forward_data["image_gen_labels"]
    assert worst(logits, forward_data["image_gen_logits"]) <= LOGITS
    assert worst(image_log_probs(bit_log_probs(logits, bits)), forward_data["image_logps_f64"]) <= LOG_PROBS
    assert worst(image_loss(logits, bits)[None], forward_data["image_loss"]) <= LOSS


@pytest.mark.parametrize("guidance", [1, 3])
def test_generation_draws_the_same_image(model, config, settings, monkeypatch, guidance):
    stored, made = load_file(GOLDEN / "generate.safetensors"), settings["generate"]
    expected = {key: stored[f"cfg{guidance}.{key}"] for key in ("bits", "logits", "summed_codes", "image")}
    logits, draw_bits = [], generate.draw_bits

    def spy(logits_BnD2, *args):
        logits.append(logits_BnD2)
        return draw_bits(logits_BnD2, *args)

    monkeypatch.setattr(generate, "draw_bits", spy)
    start = torch.tensor([[config.image_gen_start_token_id]])
    ids = torch.cat([stored["prompt_ids"], start], dim=1)
    sampling = SamplingConfig(cfg=guidance, tau=made["tau"], top_k=made["top_k"])
    drawn = generate.generate_images(
        model, ids, torch.ones_like(ids), [0], tuple(expected["image"].shape[-2:]), sampling
    )
    assert torch.equal(drawn.labels_BLs, expected["bits"])
    assert worst(torch.cat(logits, 1), expected["logits"]) <= GENERATION_LOGITS
    assert worst(drawn.summed_Bdhw, expected["summed_codes"]) <= FEATURES
    with torch.no_grad():
        original = model.image_tokenizer.decode(drawn.summed_Bdhw)
    assert worst(original, expected["image"]) <= IMAGES
    # The published code truncates, this one rounds: at most one step of 256 apart.
    assert worst(to_uint8(original), stored[f"cfg{guidance}.image_uint8_bgr"].flip(-1)) <= 1


@pytest.fixture(scope="module")
def understanding_data():
    return load_file(GOLDEN / "understanding.safetensors")


def test_understanding_is_qwen2_vl(model, config, settings, understanding_data):
    data = understanding_data
    processor = Qwen2VLImageProcessorPil(patch_size=settings["vision"]["patch_size"], min_pixels=1)
    images = [data[key].numpy() for key in sorted(data) if key.startswith("image_uint8_")]
    patches = processor(images=images, return_tensors="pt")
    assert torch.equal(patches["image_grid_thw"], data["image_grid_thw"])
    assert worst(patches["pixel_values"], data["pixel_values"]) <= FEATURES

    ids, mask, grid = data["input_ids"], data["attention_mask"], data["image_grid_thw"]
    assert torch.equal(model.positions(ids, mask, grid), data["position_ids"])
    images = {"pixel_values": data["pixel_values"], "image_grid_thw": grid}
    with torch.no_grad():
        features = torch.cat(model.get_image_features(**images).pooler_output)
        logits = model(ids, mask, **images).logits
    assert worst(features, data["image_embeds"]) <= STATES
    assert worst(logits, data["logits"]) <= LOGITS


def test_greedy_answers_are_the_same(model, config, understanding_data):
    data = understanding_data
    answer = model.generate(
        **{key: data[key] for key in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")},
        mm_token_type_ids=(data["input_ids"] == config.image_token_id).int(),
        max_new_tokens=data["greedy_ids"].shape[1] - data["input_ids"].shape[1],
        do_sample=False,
    )
    assert torch.equal(answer, data["greedy_ids"])


def edit(model: Vargpt, change: str, rename) -> None:
    """One stored edit of a weight: ``NAME *= X`` or ``NAME += X*arange(N)/N``."""
    name, operator, value = re.fullmatch(r"(\S+) ([*+])= (.+)", change).groups()
    weight = model.get_parameter(rename(name))
    with torch.no_grad():
        if operator == "*":
            weight.mul_(float(value))
        else:
            factor, count = re.fullmatch(r"([\d.]+)\*arange\((\d+)\)/\2", value).groups()
            weight.add_(float(factor) * torch.arange(int(count)) / int(count))


@pytest.fixture(scope="module")
def dpo_data():
    return load_file(GOLDEN / "dpo.safetensors"), json.loads((GOLDEN / "dpo.json").read_text())


@pytest.fixture(scope="module")
def rename(config, blocks_per_chunk):
    vae = config.image_tokenizer_config
    return lambda name: our_name(name, len(vae.channel_multipliers), vae.blocks_per_level, blocks_per_chunk)


@pytest.fixture(scope="module")
def dpo(model, config, rename, tokenizer_data, dpo_data):
    """The loss of the stored pairs, in plain torch, with its gradients on the policy."""
    tensors, values = dpo_data
    bits = tensors["image_gen_labels"]
    size = tuple(tokenizer_data[values["chosen_images"].split()[-1]].shape[-2:])
    rows = cut(tensors["input_ids"], tensors["attention_mask"], config, bits.shape[1])
    inputs = Bits().replay(bits, schedule_for(*size)).inputs_BLd
    policy = copy.deepcopy(model)
    for change in values["policy_perturbation"]:
        edit(policy, change, rename)

    def log_probs(scorer: Vargpt) -> torch.Tensor:
        logits = scorer(rows.ids, rows.mask, Drawing(inputs, size), text_logits=False).image_logits
        return image_log_probs(bit_log_probs(logits, bits))

    with torch.no_grad():
        reference_B = log_probs(model)
    policy_B = log_probs(policy)
    chosen, rejected = (policy_B - reference_B).chunk(2)
    losses = -torch.nn.functional.logsigmoid(values["beta"] * (chosen - rejected))
    losses.mean().backward()
    return policy, policy_B.detach(), reference_B, losses.detach()


def test_dpo_losses_and_log_probs_agree(dpo, dpo_data):
    tensors, values = dpo_data
    _, policy_B, reference_B, losses = dpo
    assert worst(policy_B, tensors["policy_logps"]) <= LOG_PROBS
    assert worst(reference_B, tensors["ref_logps"]) <= LOG_PROBS
    # The stored log-probabilities are fp32 sums, a spacing of 1e-3 each: four of them, rounded, at beta 0.1.
    assert worst(losses, torch.tensor(values["losses"])) <= 4 * 1e-3 * values["beta"]


def test_dpo_gradients_agree(dpo, dpo_data, rename):
    # Relative, for gradients of a sum over L x d bits are large; 1e-3 is what the fp32 log-ratios leave of the
    # pair's weight sigmoid(-beta x margin).
    tensors, policy = dpo_data[0], dpo[0]
    stored = {name.removeprefix("grad."): tensor for name, tensor in tensors.items() if name.startswith("grad.")}
    assert stored
    for name, gradient in stored.items():
        ours = policy.get_parameter(rename(name)).grad
        assert worst(ours.view_as(gradient), gradient) <= 1e-3 * gradient.abs().max(), name


def test_dpo_gradient_norms_agree_for_every_parameter(dpo, dpo_data, rename):
    policy = dpo[0]
    for name, norm in dpo_data[1]["policy_grad_norms"].items():
        if rename(name) is None:
            assert norm is None, name
            continue
        gradient = policy.get_parameter(rename(name)).grad
        ours = 0.0 if gradient is None else gradient.norm().item()
        # Below 1e-4 the stored norm is noise: the pool's query under a softmax over one key.
        assert ours == pytest.approx(norm or 0.0, rel=1e-3, abs=1e-4), name
