"""Names of the released checkpoint's tensors in this model.

Every released tensor is either renamed (some reshaped) or dropped for a stated reason; anything else is an error.
"""

import re

import torch

_RENAMES: list[tuple[str, str]] = [
    (r"visual\.", r"model.visual."),
    (r"model\.", r"model.language_model."),
    (r"lm_head\.", r"lm_head."),
    (r"image_gen_projector\.mlp\.0\.", r"projector_in.fc1."),
    (r"image_gen_projector\.mlp\.2\.", r"projector_in.fc2."),
    (r"image_gen_projector_out\.mlp\.0\.", r"projector_out.fc1."),
    (r"image_gen_projector_out\.mlp\.2\.", r"projector_out.fc2."),
    (r"vargpt_gen\.cfg_uncond$", r"image_decoder.condition.unconditional"),
    (r"vargpt_gen\.text_norm\.", r"image_decoder.condition.norm."),
    (r"vargpt_gen\.text_proj_for_sos\.ca\.mat_q$", r"image_decoder.condition.pool.query"),
    (r"vargpt_gen\.text_proj_for_sos\.ca\.mat_kv\.", r"image_decoder.condition.pool.kv."),
    (r"vargpt_gen\.text_proj_for_sos\.ca\.", r"image_decoder.condition.pool."),
    (r"vargpt_gen\.pos_start$", r"image_decoder.condition.start_position"),
    (r"vargpt_gen\.shared_ada_lin\.1\.", r"image_decoder.condition.modulation."),
    (r"vargpt_gen\.head_nm\.ada_lin\.1\.", r"image_decoder.condition.head_modulation."),
    (r"vargpt_gen\.word_embed\.", r"image_decoder.word_embedding."),
    (r"vargpt_gen\.lvl_embed\.", r"image_decoder.level_embedding."),
    (r"vargpt_gen\.head\.", r"image_decoder.head."),
]

_BLOCK_RENAMES: list[tuple[str, str]] = [
    (r"^ada_gss$", "modulation_offset"),
    (r"^sa\.scale_mul_1H11$", "self_attention.log_scale"),
    (r"^sa\.mat_qkv\.", "self_attention.qkv."),
    (r"^sa\.", "self_attention."),
    (r"^ca\.mat_q\.", "cross_attention.q."),
    (r"^ca\.mat_kv\.", "cross_attention.kv."),
    (r"^ca\.", "cross_attention."),
    (r"^ca_norm\.", "cross_norm."),
    (r"^ffn\.", "feed_forward."),
]

DROPPED: dict[str, str] = {
    r"image_gen_projector(_out)?\.ln_q\.": "never applied by the reference",
    r"vargpt_gen\.text_proj_for_ca\.": "its result is thrown away by the reference",
    r".*\.zero_k_bias$": "a buffer of zeros",
    r"vae_local\.quantizer\.lfq\.mask$": "powers of two",
}


def _first_match(patterns: list[tuple[str, str]], name: str) -> str | None:
    for pattern, replacement in patterns:
        renamed, count = re.subn("^" + pattern.removeprefix("^"), replacement, name, count=1)
        if count:
            return renamed
    return None


def _tokenizer_name(name: str, levels: int, blocks_per_level: int) -> str:
    """``vae_local.*`` -> ``image_tokenizer.*``: one module less deep, levels numbered in order of execution."""

    def up(match: re.Match) -> str:
        return f"levels.{levels - 1 - int(match[1])}."

    name = name.removeprefix("vae_local.").replace("nin_shortcut", "shortcut")
    name = re.sub(r"\.(conv|norm)\.(weight|bias)$", r".\2", name)
    name = re.sub(r"mid\.block_(\d)", lambda match: f"middle.{int(match[1]) - 1}", name)
    name = re.sub(r"\.downsample\.", f".block.{blocks_per_level}.", name)
    name = re.sub(r"\.upsample\.", f".block.{blocks_per_level + 1}.", name)
    name = re.sub(r"down\.(\d)\.block\.", r"levels.\1.", name)
    return "image_tokenizer." + re.sub(r"up\.(\d)\.block\.", up, name)


def our_name(name: str, levels: int, blocks_per_level: int, blocks_per_chunk: int) -> str | None:
    """Our name of a released tensor; None if it is dropped (see ``DROPPED``). KeyError for an unknown name.

    ``levels`` and ``blocks_per_level`` are those of the image tokenizer, ``blocks_per_chunk`` of the visual decoder.
    """
    if any(re.match(pattern, name) for pattern in DROPPED):
        return None
    if name == "sos_embedding.weight":
        return "image_decoder.condition.start_embedding"
    if name.startswith("vae_local."):
        return _tokenizer_name(name, levels, blocks_per_level)
    block = re.match(r"vargpt_gen\.block_chunks\.(\d+)\.module\.(\d+)\.(.*)", name)
    if block:
        index = int(block[1]) * blocks_per_chunk + int(block[2])
        inner = _first_match(_BLOCK_RENAMES, block[3])
        if inner:
            return f"image_decoder.blocks.{index}.{inner}"
    renamed = _first_match(_RENAMES, name)
    if renamed is None:
        raise KeyError(f"unknown tensor in a released checkpoint: {name}")
    return renamed


def from_release(tensors: dict[str, torch.Tensor], config, blocks_per_chunk: int) -> dict[str, torch.Tensor]:
    """A released state dict under our names. ``config`` is a VargptConfig of the same sizes.

    Of ``sos_embedding`` only the last row, that of ``image_gen_start``, is ever read; the others are dropped.
    """
    tokenizer = config.image_tokenizer_config
    renamed = {}
    for name, tensor in tensors.items():
        ours = our_name(name, len(tokenizer.channel_multipliers), tokenizer.blocks_per_level, blocks_per_chunk)
        if name == "sos_embedding.weight":
            tensor = tensor[-1]
        if ours is not None:
            renamed[ours] = tensor
    return renamed
