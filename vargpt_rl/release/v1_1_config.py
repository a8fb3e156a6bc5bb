"""Convert the released checkpoint's config.json to this model's configuration and back.

The release's file describes the language model and the vision tower (flat, as transformers 4.46 wrote them) and the
special tokens. It does not have the sizes of the decoder and the image tokenizer: they are inferred from the tensors'
shapes. Values that no shape determines (such as norm groups) come from ``decoder_config`` and
``image_tokenizer_config`` if the file has them, as those written here do, and otherwise from the release.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig, Qwen2VLVisionConfig

from vargpt_rl.model.configuration import DecoderConfig, ImageTokenizerConfig, VargptConfig
from vargpt_rl.release.v1_1_names import (
    START,
    START_ROWS,
    dropped_shapes,
    neutral,
    reason_dropped,
    release_name,
    start_rows_shape,
)

MODEL_TYPE = "vargpt_qwen2_vl"
RELEASE_CHUNKS = 8
NEW_TOKENS = ("image_gen_start", "image_gen_end", "image_gen_pad")
Shapes = dict[str, tuple[int, ...]]

_TEXT_KEYS = set(Qwen2VLTextConfig.__annotations__) - {"rope_parameters", "layer_types"}
_VISION_KEYS = set(Qwen2VLVisionConfig.__annotations__) - {"rope_parameters"}
_TOKEN_KEYS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


class Sizes(NamedTuple):
    """Sizes that names in a released checkpoint depend on: the arguments of ``our_name``."""

    levels: int
    blocks_per_level: int
    blocks_per_chunk: int


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as config.json does: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def usual(sizes: Iterable[int], what: str) -> int:
    """Return the most common size, so that one misshapen tensor does not change what is expected of the others."""
    counted = Counter(sizes).most_common(1)
    if not counted:
        raise ValueError(f"no tensor {what}, which is needed to infer the model's sizes")
    return counted[0][0]


def matches(shapes: Shapes, pattern: str) -> list[tuple[re.Match, tuple[int, ...]]]:
    """Return matching names with their shapes, except of empty tensors, which tell no size."""
    found = [(re.fullmatch(pattern, name), shape) for name, shape in shapes.items() if shape and 0 not in shape]
    return [(match, shape) for match, shape in found if match]


def decoder_config(shapes: Shapes, stated: dict[str, Any]) -> tuple[DecoderConfig, int]:
    """Infer the decoder's configuration and its blocks per chunk from the shapes of ``vargpt_gen.*``."""
    name = r"vargpt_gen\.block_chunks\.(\d+)\.module\.(\d+)"
    biases = matches(shapes, rf"{name}\.(sa|ca)\.v_bias")
    scales = matches(shapes, rf"{name}\.sa\.scale_mul_1H11")
    width = usual((shape[0] for _, shape in biases), "vargpt_gen.block_chunks.*.sa.v_bias")
    heads = usual((math.prod(shape) for _, shape in scales), "vargpt_gen.block_chunks.*.sa.scale_mul_1H11")
    chunks = len({match[1] for match, _ in biases})
    blocks_per_chunk = len({match[2] for match, _ in biases})
    sizes = {"width": width, "depth": chunks * blocks_per_chunk, "heads": heads}
    return DecoderConfig(**stated | sizes), blocks_per_chunk


def image_tokenizer_config(shapes: Shapes, stated: dict[str, Any]) -> ImageTokenizerConfig:
    """Infer the image tokenizer's configuration from the shapes of ``vae_local.*``."""
    name = "vae_local.encoder.down.*.block.*.conv*.conv.bias"
    block = r"vae_local\.encoder\.down\.(\d+)\.block\.(\d+)"
    parts = matches(shapes, rf"{block}\.(conv[12]\.conv|norm2\.norm)\.(weight|bias)")
    levels = max(1, len({match[1] for match, _ in parts}))
    widths = [usual((shape[0] for match, shape in parts if match[1] == str(i)), name) for i in range(levels)]
    ends = matches(shapes, r"vae_local\.(encoder\.conv_out\.conv\.bias|quantizer\.lfq\.mask)")
    words = matches(shapes, r"vargpt_gen\.word_embed\.weight")
    bits = [*(shape[0] for _, shape in ends), *(shape[-1] for _, shape in words)]
    base = math.gcd(*widths)
    sizes = {
        "bits": usual(bits, "vargpt_gen.word_embed.weight"),
        "base_channels": base,
        "channel_multipliers": [width // base for width in widths],
        "blocks_per_level": len({match[2] for match, _ in parts}),
    }
    return ImageTokenizerConfig(**stated | sizes)


def own_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings that the class declares, without extra ones of a file or of transformers."""
    return {key: getattr(config, key) for key in type(config).__annotations__}


def sizes_of(config: VargptConfig, blocks_per_chunk: int) -> Sizes:
    """Return the sizes that names depend on."""
    tokenizer = config.image_tokenizer_config
    return Sizes(len(tokenizer.channel_multipliers), tokenizer.blocks_per_level, blocks_per_chunk)


def from_release_config(release: dict[str, Any], shapes: Shapes, dtype: torch.dtype) -> tuple[VargptConfig, int]:
    """Return our configuration and the blocks per chunk.

    ``release`` is the released config.json, or a record of test data with it under ``hf_config``. Raises ValueError
    naming the key or tensor that is wrong or missing.
    """
    stated = release.get("hf_config", release)
    if stated.get("model_type") != MODEL_TYPE:
        raise ValueError(f"config.json: model_type is {stated.get('model_type')!r}, expected {MODEL_TYPE!r}")
    decoder, blocks_per_chunk = decoder_config(shapes, stated.get("decoder_config", {}))
    tokenizer = image_tokenizer_config(shapes, stated.get("image_tokenizer_config", {}))
    rope = dict(stated.get("rope_scaling") or {})
    if "mrope_section" not in rope:
        raise ValueError("config.json: rope_scaling has no mrope_section")
    kind = rope.pop("type", "mrope")
    rope |= {"rope_type": "default" if kind == "mrope" else kind, "rope_theta": stated.get("rope_theta", 1e6)}
    tokens = stated.get("special_tokens", {})
    ids = {f"{name}_token_id": tokens[f"{name}_token_id"] for name in NEW_TOKENS if f"{name}_token_id" in tokens}
    vision = stated.get("vision_config", {})
    config = VargptConfig(
        text_config={key: stated[key] for key in _TEXT_KEYS if key in stated} | {"rope_parameters": rope},
        vision_config={key: vision[key] for key in _VISION_KEYS if key in vision},
        decoder_config=decoder,
        image_tokenizer_config=tokenizer,
        tie_word_embeddings=stated.get("tie_word_embeddings", False),
        dtype=dtype_name(dtype),
        architectures=["Vargpt"],
        **{key: stated[key] for key in _TOKEN_KEYS if key in stated},
        **ids,
    )
    return config, blocks_per_chunk


def to_release_config(config: VargptConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Make a config.json in the release's format for a model that was not converted from one."""
    text, vision = config.text_config, config.vision_config
    rope = dict(text.rope_parameters)
    kind = rope.pop("rope_type")
    theta = rope.pop("rope_theta")
    special = {name: f"<|{name}|>" for name in NEW_TOKENS}
    special |= {f"{name}_token_id": getattr(config, f"{name}_token_id") for name in NEW_TOKENS}
    return {
        "architectures": ["VARGPTQwen2VLForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "torch_dtype": dtype_name(dtype),
        "tie_word_embeddings": config.tie_word_embeddings,
        **{key: getattr(text, key) for key in sorted(_TEXT_KEYS)},
        "rope_theta": theta,
        "rope_scaling": {"type": "mrope" if kind == "default" else kind, **rope},
        "vision_config": {key: getattr(vision, key) for key in sorted(_VISION_KEYS)} | {"model_type": MODEL_TYPE},
        **{key: getattr(config, key) for key in _TOKEN_KEYS},
        "special_tokens": special,
        "decoder_config": own_settings(config.decoder_config),
        "image_tokenizer_config": own_settings(config.image_tokenizer_config),
    }


@dataclass(frozen=True)
class Release:
    """The published layout of one model's tensors.

    Only the last rows of the released table ``rows`` are used: they are our tensor ``our_rows``.
    """

    config: VargptConfig
    blocks_per_chunk: int
    model_type = MODEL_TYPE
    rows = START_ROWS
    our_rows = START

    @classmethod
    def of_released(cls, stated: dict[str, Any], shapes: Shapes, dtype: torch.dtype) -> "Release":
        """Make the layout of a released checkpoint from its config.json and tensor shapes."""
        return cls(*from_release_config(stated, shapes, dtype))

    @classmethod
    def of_model(cls, config: VargptConfig, kept: Iterable[str]) -> "Release":
        """Make the layout of one of our models.

        The number of chunks is that of the released tensors ``kept`` with it; without any, it is the release's if the
        depth is divisible.
        """
        modules = {re.sub(r"^vargpt_gen\.block_chunks\.\d+\.module\.(\d+)\..*", r"\1", name) for name in kept}
        depth = config.decoder_config.depth
        return cls(config, sum(map(str.isdecimal, modules)) or depth // math.gcd(depth, RELEASE_CHUNKS))

    def name(self, ours: str) -> str:
        """Return the released name of one of our tensors."""
        return release_name(ours, *sizes_of(self.config, self.blocks_per_chunk))

    def left_out(self) -> Shapes:
        """Return name and shape of every released tensor, ``rows`` included, that our model does not have."""
        return dropped_shapes(self.config, self.blocks_per_chunk) | {START_ROWS: start_rows_shape(self.config)}

    def dtype(self, name: str, usual: torch.dtype) -> torch.dtype:
        """Return the dtype of a tensor that is left out; ``usual`` is that of the checkpoint."""
        return torch.int64 if name.endswith("lfq.mask") else usual

    def neutral(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Make a neutral replacement for a tensor that is left out and was not kept."""
        return neutral(name, self.left_out()[name], dtype)

    def reason(self, name: str) -> str:
        """Say why a released tensor, or part of it, is left out."""
        reason = "only the row of image_gen_start is ever read" if name == START_ROWS else reason_dropped(name)
        assert reason is not None, f"{name} is not left out"
        return reason

    def stated(self, dtype: torch.dtype) -> dict[str, Any]:
        """Make a config.json in the release's format."""
        return to_release_config(self.config, dtype)
