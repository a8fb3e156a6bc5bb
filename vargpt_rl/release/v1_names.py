"""Map this model's tensor names to those of the released v1 checkpoint.

The other direction is the inverse over the names of a model. Released tensors that this model drops have a stated
reason; anything else is an error.
"""

import re

import torch

from vargpt_rl.model.scales import STRIDE, scale_index, token_count
from vargpt_rl.model.v1.configuration import VargptV1Config

ROWS = "vargpt_gen.class_emb.weight"
"""Only its last two rows, "draw" (``image_gen_start``) and "dropped", are ever used: our ``OUR_ROWS``."""
OUR_ROWS = "image_decoder.class_embedding.weight"
ROWS_REASON = "only the rows of image_gen_start and of the dropped condition are ever read"

# Our prefix and the released one; the first match counts.
_PREFIXES: list[tuple[str, str]] = [
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("projector_in.fc1.", "image_gen_projector.mlp.0."),
    ("projector_in.fc2.", "image_gen_projector.mlp.2."),
    ("projector_out.fc1.", "image_gen_projector_out.mlp.0."),
    ("projector_out.fc2.", "image_gen_projector_out.mlp.2."),
    (OUR_ROWS, ROWS),
    ("image_decoder.word_embedding.", "vargpt_gen.word_embed."),
    ("image_decoder.places.start", "vargpt_gen.pos_start"),
    ("image_decoder.places.position", "vargpt_gen.pos_1LC"),
    ("image_decoder.places.level.", "vargpt_gen.lvl_embed."),
    ("image_decoder.head_modulation.", "vargpt_gen.head_nm.ada_lin.1."),
    ("image_decoder.head.", "vargpt_gen.head."),
    ("image_decoder.blocks.", "vargpt_gen.blocks."),
    ("image_tokenizer.to_latent.", "vae_local.quant_conv."),
    ("image_tokenizer.from_latent.", "vae_local.post_quant_conv."),
    ("image_tokenizer.codebook.", "vae_local.quantize.embedding."),
    ("image_tokenizer.residual.", "vae_local.quantize.quant_resi.qresi_ls."),
    ("image_tokenizer.", "vae_local."),
]
# Within a block of the decoder.
_BLOCK_PARTS = {
    ".modulation.": ".ada_lin.1.",
    ".self_attention.log_scale": ".attn.scale_mul_1H11",
    ".self_attention.qkv.": ".attn.mat_qkv.",
    ".self_attention.": ".attn.",
    ".feed_forward.": ".ffn.",
}
_MIDDLE = {"0": "block_1", "1": "attn_1", "2": "block_2"}

DROPPED: dict[str, str] = {
    r"image_gen_projector(_out)?\.ln_q\.(weight|bias)": "never applied by the reference",
    r"vargpt_gen\.blocks\.\d+\.attn\.zero_k_bias": "a buffer of zeros",
    r"vargpt_gen\.lvl_1L": "the scale of each token",
    r"vargpt_gen\.attn_bias_for_masking": "the block-causal mask",
    r"vae_local\.quantize\.ema_vocab_hit_SV": "a training statistic of the image tokenizer",
}


def reason_dropped(name: str) -> str | None:
    """Say why this model drops a released tensor, or most of it; None if it does not."""
    if name == ROWS:
        return ROWS_REASON
    return next((reason for pattern, reason in DROPPED.items() if re.fullmatch(pattern, name)), None)


def _released_tokenizer_part(name: str, levels: int, blocks_per_level: int) -> str:
    """Name a part of the image tokenizer: blocks and attentions of a level are numbered separately."""

    def part(match: re.Match) -> str:
        half, level, at = match[1], int(match[2]), int(match[3])
        down = half == "encoder"
        level, blocks = (level, blocks_per_level) if down else (levels - 1 - level, blocks_per_level + 1)
        kinds = ("block", "attn") if level == levels - 1 else ("block",)
        block, kind = divmod(at, len(kinds))
        inside = f"{kinds[kind]}.{block}" if block < blocks else ("downsample" if down else "upsample")
        return f"{half}.{'down' if down else 'up'}.{level}.{inside}."

    name = re.sub(r"(encoder|decoder)\.levels\.(\d+)\.(\d+)\.", part, name)
    name = re.sub(r"\.middle\.(\d)\.", lambda match: f".mid.{_MIDDLE[match[1]]}.", name)
    name = re.sub(r"(attn[._]\d\.)proj\.", r"\1proj_out.", name)
    return name.replace(".shortcut.", ".nin_shortcut.")


def release_name(name: str, config: VargptV1Config) -> str:
    """Return the released name of one of our tensors. Raises KeyError if it is unknown."""
    prefix, released = next((pair for pair in _PREFIXES if name.startswith(pair[0])), ("", ""))
    if not prefix:
        raise KeyError(f"unknown tensor in a model: {name}")
    rest = name.removeprefix(prefix)
    if prefix == "image_decoder.blocks.":
        ours = next((part for part in _BLOCK_PARTS if part in rest), None)
        if ours is None:
            raise KeyError(f"unknown tensor in a model: {name}")
        rest = rest.replace(ours, _BLOCK_PARTS[ours])
    if prefix == "image_tokenizer.":
        tokenizer = config.image_tokenizer_config
        rest = _released_tokenizer_part(rest, len(tokenizer.channel_multipliers), tokenizer.blocks_per_level)
    return released + rest


def dropped_shapes(config: VargptV1Config) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every released tensor that this model drops, ``ROWS`` included."""
    decoder, tokenizer = config.decoder_config, config.image_tokenizer_config
    width, tokens = decoder.width, token_count(tokenizer.schedule_for(tokenizer.sides[-1] * STRIDE))
    shapes = {
        ROWS: (config.image_gen_start_token_id + 2, width),
        "vargpt_gen.lvl_1L": (1, tokens),
        "vargpt_gen.attn_bias_for_masking": (1, 1, tokens, tokens),
        "vae_local.quantize.ema_vocab_hit_SV": (len(tokenizer.sides), tokenizer.codes),
    }
    for projector, size in (
        ("image_gen_projector", width),
        ("image_gen_projector_out", config.text_config.hidden_size),
    ):
        shapes |= {f"{projector}.ln_q.{leaf}": (size,) for leaf in ("weight", "bias")}
    return shapes | {f"vargpt_gen.blocks.{index}.attn.zero_k_bias": (width,) for index in range(decoder.depth)}


def dropped_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a dropped tensor in a checkpoint of this dtype."""
    return torch.int64 if name == "vargpt_gen.lvl_1L" else dtype


def neutral(name: str, shape: tuple[int, ...], dtype: torch.dtype, config: VargptV1Config) -> torch.Tensor:
    """Make a dropped tensor that was not kept: the reference's buffer, or weights without effect."""
    tokenizer = config.image_tokenizer_config
    scale_L = scale_index(tokenizer.schedule_for(tokenizer.sides[-1] * STRIDE))
    if name == "vargpt_gen.lvl_1L":
        return scale_L[None]
    if name == "vargpt_gen.attn_bias_for_masking":
        hidden_LL = scale_L[:, None] < scale_L
        return torch.zeros(shape, dtype=dtype).masked_fill(hidden_LL, -torch.inf)
    return torch.ones(shape, dtype=dtype) if name.endswith("ln_q.weight") else torch.zeros(shape, dtype=dtype)


def from_release(tensors: dict[str, torch.Tensor], config: VargptV1Config, names: list[str]) -> dict[str, torch.Tensor]:
    """Rename a released state dict to our ``names``. Raises KeyError if a tensor is missing."""
    renamed = {name: tensors[release_name(name, config)] for name in names}
    renamed[OUR_ROWS] = renamed[OUR_ROWS][-2:]
    return renamed
