"""Map tensor names of the released v1.1 checkpoint to this model's and back.

Every released tensor is either renamed (some reshaped) or dropped for a stated reason; anything else is an error. The
two directions are inverses.
"""

import re

import torch

from vargpt_rl.model.configuration import VargptConfig

START_ROWS = "sos_embedding.weight"
"""Only its last row, that of ``image_gen_start``, is ever used; it is our ``START``."""
START = "image_decoder.condition.start_embedding"

# Released prefix and ours; the first match counts, in either direction.
_PREFIXES: list[tuple[str, str]] = [
    ("visual.", "model.visual."),
    ("model.", "model.language_model."),
    ("lm_head.", "lm_head."),
    ("image_gen_projector.mlp.0.", "projector_in.fc1."),
    ("image_gen_projector.mlp.2.", "projector_in.fc2."),
    ("image_gen_projector_out.mlp.0.", "projector_out.fc1."),
    ("image_gen_projector_out.mlp.2.", "projector_out.fc2."),
    ("vargpt_gen.cfg_uncond", "image_decoder.condition.unconditional"),
    ("vargpt_gen.text_norm.", "image_decoder.condition.norm."),
    ("vargpt_gen.text_proj_for_sos.ca.mat_q", "image_decoder.condition.pool.query"),
    ("vargpt_gen.text_proj_for_sos.ca.mat_kv.", "image_decoder.condition.pool.kv."),
    ("vargpt_gen.text_proj_for_sos.ca.", "image_decoder.condition.pool."),
    ("vargpt_gen.pos_start", "image_decoder.condition.start_position"),
    ("vargpt_gen.shared_ada_lin.1.", "image_decoder.condition.modulation."),
    ("vargpt_gen.head_nm.ada_lin.1.", "image_decoder.condition.head_modulation."),
    ("vargpt_gen.word_embed.", "image_decoder.word_embedding."),
    ("vargpt_gen.lvl_embed.", "image_decoder.level_embedding."),
    ("vargpt_gen.head.", "image_decoder.head."),
    (START_ROWS, START),
]

_BLOCK_PREFIXES: list[tuple[str, str]] = [
    ("ada_gss", "modulation_offset"),
    ("sa.scale_mul_1H11", "self_attention.log_scale"),
    ("sa.mat_qkv.", "self_attention.qkv."),
    ("sa.", "self_attention."),
    ("ca.mat_q.", "cross_attention.q."),
    ("ca.mat_kv.", "cross_attention.kv."),
    ("ca.", "cross_attention."),
    ("ca_norm.", "cross_norm."),
    ("ffn.", "feed_forward."),
]

DROPPED: dict[str, str] = {
    r"image_gen_projector(_out)?\.ln_q\.": "never applied by the reference",
    r"vargpt_gen\.text_proj_for_ca\.": "its result is thrown away by the reference",
    r".*\.zero_k_bias$": "a buffer of zeros",
    r"vae_local\.quantizer\.lfq\.mask$": "powers of two",
}


def reason_dropped(name: str) -> str | None:
    """Say why this model drops a released tensor; None if it does not."""
    return next((reason for pattern, reason in DROPPED.items() if re.match(pattern, name)), None)


def _swap(pairs: list[tuple[str, str]], name: str) -> str | None:
    for prefix, replacement in pairs:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return None


def _swap_back(pairs: list[tuple[str, str]], name: str) -> str | None:
    return _swap([(ours, released) for released, ours in pairs], name)


def _tokenizer_name(name: str, levels: int, blocks_per_level: int) -> str:
    """Map ``vae_local.*`` to ``image_tokenizer.*``: one module less deep, levels in order of execution."""

    def up(match: re.Match) -> str:
        return f"levels.{levels - 1 - int(match[1])}."

    name = name.removeprefix("vae_local.").replace("nin_shortcut", "shortcut")
    name = re.sub(r"\.(conv|norm)\.(weight|bias)$", r".\2", name)
    name = re.sub(r"mid\.block_(\d)", lambda match: f"middle.{int(match[1]) - 1}", name)
    name = re.sub(r"\.downsample\.", f".block.{blocks_per_level}.", name)
    name = re.sub(r"\.upsample\.", f".block.{blocks_per_level + 1}.", name)
    name = re.sub(r"down\.(\d+)\.block\.", r"levels.\1.", name)
    return "image_tokenizer." + re.sub(r"up\.(\d+)\.block\.", up, name)


def wrapped(name: str) -> str:
    """Insert the module that wraps every convolution and norm of the image tokenizer in the release."""
    return re.sub(
        r"\.((norm|conv|nin)\w*)\.(weight|bias)$",
        lambda match: f".{match[1]}.{'norm' if match[2] == 'norm' else 'conv'}.{match[3]}",
        name,
    )


def _released_tokenizer_name(name: str, levels: int, blocks_per_level: int) -> str:
    """Map ``image_tokenizer.*`` to ``vae_local.*``."""

    def level(match: re.Match) -> str:
        half, index, block = match[1], int(match[2]), int(match[3])
        if half == "encoder":
            return f"encoder.down.{index}." + ("downsample." if block == blocks_per_level else f"block.{block}.")
        up = f"decoder.up.{levels - 1 - index}."
        return up + ("upsample." if block == blocks_per_level + 1 else f"block.{block}.")

    name = name.removeprefix("image_tokenizer.").replace("shortcut", "nin_shortcut")
    name = re.sub(r"middle\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    return "vae_local." + wrapped(re.sub(r"^(encoder|decoder)\.levels\.(\d+)\.(\d+)\.", level, name))


def release_name(name: str, levels: int, blocks_per_level: int, blocks_per_chunk: int) -> str:
    """Return the released name of one of our tensors (inverse of ``our_name``). Raises KeyError if it is unknown."""
    if name.startswith("image_tokenizer."):
        return _released_tokenizer_name(name, levels, blocks_per_level)
    block = re.match(r"image_decoder\.blocks\.(\d+)\.(.*)", name)
    if block:
        chunk, index = divmod(int(block[1]), blocks_per_chunk)
        inner = _swap_back(_BLOCK_PREFIXES, block[2])
        released = inner and f"vargpt_gen.block_chunks.{chunk}.module.{index}.{inner}"
    else:
        released = _swap_back(_PREFIXES, name)
    if released is None:
        raise KeyError(f"unknown tensor in a model: {name}")
    return released


def our_name(name: str, levels: int, blocks_per_level: int, blocks_per_chunk: int) -> str | None:
    """Return our name of a released tensor; None if it is dropped (see ``DROPPED``). Raises KeyError if it is unknown.

    ``levels`` and ``blocks_per_level`` are those of the image tokenizer, ``blocks_per_chunk`` of the visual decoder.
    """
    if reason_dropped(name):
        return None
    sizes = (levels, blocks_per_level, blocks_per_chunk)
    block = re.match(r"vargpt_gen\.block_chunks\.(\d+)\.module\.(\d+)\.(.*)", name)
    ours: str | None
    if name.startswith("vae_local."):
        ours = _tokenizer_name(name, levels, blocks_per_level)
    elif block:
        index = int(block[1]) * blocks_per_chunk + int(block[2])
        inner = _swap(_BLOCK_PREFIXES, block[3])
        ours = inner and f"image_decoder.blocks.{index}.{inner}"
    else:
        ours = _swap(_PREFIXES, name)
    if ours is None or release_name(ours, *sizes) != name:
        raise KeyError(f"unknown tensor in a released checkpoint: {name}")
    return ours


def from_release(
    tensors: dict[str, torch.Tensor], config: VargptConfig, blocks_per_chunk: int
) -> dict[str, torch.Tensor]:
    """Rename a released state dict to our names. ``config`` is that of a model of the same sizes."""
    tokenizer = config.image_tokenizer_config
    renamed = {}
    for name, tensor in tensors.items():
        ours = our_name(name, len(tokenizer.channel_multipliers), tokenizer.blocks_per_level, blocks_per_chunk)
        if ours is not None:
            renamed[ours] = tensor[-1] if name == START_ROWS else tensor
    return renamed


def dropped_shapes(config: VargptConfig, blocks_per_chunk: int) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every released tensor that ``our_name`` drops."""
    width, hidden = config.decoder_config.width, config.text_config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"vae_local.quantizer.lfq.mask": (config.image_tokenizer_config.bits,)}
    for projector, size in (("image_gen_projector", width), ("image_gen_projector_out", hidden)):
        shapes |= {f"{projector}.ln_q.{leaf}": (size,) for leaf in ("weight", "bias")}
    for layer in (0, 2):
        shapes[f"vargpt_gen.text_proj_for_ca.{layer}.weight"] = (width, width)
        shapes[f"vargpt_gen.text_proj_for_ca.{layer}.bias"] = (width,)
    shapes["vargpt_gen.text_proj_for_sos.ca.zero_k_bias"] = (width,)
    for index in range(config.decoder_config.depth):
        chunk, module = divmod(index, blocks_per_chunk)
        for attention in ("sa", "ca"):
            shapes[f"vargpt_gen.block_chunks.{chunk}.module.{module}.{attention}.zero_k_bias"] = (width,)
    return shapes


def start_rows_shape(config: VargptConfig) -> tuple[int, int]:
    """Return the shape of the released ``START_ROWS``."""
    return (config.image_gen_start_token_id + 1, config.decoder_config.width)


def neutral(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Make a dropped tensor that was not kept: the reference's buffer, or weights without effect."""
    if name.endswith("lfq.mask"):
        return 2 ** torch.arange(shape[0] - 1, -1, -1)
    return torch.ones(shape, dtype=dtype) if name.endswith("ln_q.weight") else torch.zeros(shape, dtype=dtype)
