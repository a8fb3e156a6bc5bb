"""The released checkpoint's config.json and this model's configuration, each made from the other.

The release's file states the language model and the vision tower (flat, as transformers 4.46 wrote them) and the
special tokens. The sizes of the decoder and the image tokenizer stand nowhere in it: they are read off the tensors'
shapes. What no shape tells (norm groups and the like) is taken from ``decoder_config`` and ``image_tokenizer_config``
where the file has them, as those written here do, and is otherwise the release's.
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
    """What a name in a released checkpoint depends on: the arguments of ``our_name``."""

    levels: int
    blocks_per_level: int
    blocks_per_chunk: int


def dtype_name(dtype: torch.dtype) -> str:
    """As config.json has it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def usual(sizes: Iterable[int], what: str) -> int:
    """The commonest: one misshapen tensor does not change what is expected of all the others."""
    counted = Counter(sizes).most_common(1)
    if not counted:
        raise ValueError(f"no tensor {what}, from which the model's sizes are read")
    return counted[0][0]


def matches(shapes: Shapes, pattern: str) -> list[tuple[re.Match, tuple[int, ...]]]:
    """Names that fit, with their shapes; a tensor without elements tells no size."""
    found = [(re.fullmatch(pattern, name), shape) for name, shape in shapes.items() if shape and math.prod(shape)]
    return [(match, shape) for match, shape in found if match]


def decoder_config(shapes: Shapes, stated: dict[str, Any]) -> tuple[DecoderConfig, int]:
    """The decoder's configuration and its blocks per chunk, from the shapes of ``vargpt_gen.*``."""
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
    """The image tokenizer's configuration, from the shapes of ``vae_local.*``."""
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
    """The settings that its class declares, without what else a file had or transformers adds."""
    return {key: getattr(config, key) for key in type(config).__annotations__}


def sizes_of(config: VargptConfig, blocks_per_chunk: int) -> Sizes:
    """The sizes that names depend on."""
    tokenizer = config.image_tokenizer_config
    return Sizes(len(tokenizer.channel_multipliers), tokenizer.blocks_per_level, blocks_per_chunk)


def from_release_config(release: dict[str, Any], shapes: Shapes, dtype: torch.dtype) -> tuple[VargptConfig, int]:
    """Our configuration and the blocks per chunk. ValueError naming the key or the tensor that is wrong or missing.

    ``release`` is the released config.json, or a record of test data with it under ``hf_config``.
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
    """A config.json as the release has it, for a model that never was one."""
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
    """How the tensors of one model stand in a checkpoint of the published layout.

    ``rows`` is a released table of which only the last rows are read: they are our tensor ``our_rows``.
    """

    config: VargptConfig
    blocks_per_chunk: int
    model_type = MODEL_TYPE
    rows = START_ROWS
    our_rows = START

    @classmethod
    def of_released(cls, stated: dict[str, Any], shapes: Shapes, dtype: torch.dtype) -> "Release":
        """Of a checkpoint with this config.json and these tensors."""
        return cls(*from_release_config(stated, shapes, dtype))

    @classmethod
    def of_model(cls, config: VargptConfig, kept: Iterable[str]) -> "Release":
        """Of a model beside which the released tensors ``kept`` are kept; where there are none, with as many chunks as
        the release, if the depth allows it."""
        modules = {re.sub(r"^vargpt_gen\.block_chunks\.\d+\.module\.(\d+)\..*", r"\1", name) for name in kept}
        depth = config.decoder_config.depth
        return cls(config, sum(map(str.isdecimal, modules)) or depth // math.gcd(depth, RELEASE_CHUNKS))

    def name(self, ours: str) -> str:
        """The released name of one of our tensors."""
        return release_name(ours, *sizes_of(self.config, self.blocks_per_chunk))

    def left_out(self) -> Shapes:
        """Name and shape of every released tensor, ``rows`` among them, that a model keeps aside."""
        return dropped_shapes(self.config, self.blocks_per_chunk) | {START_ROWS: start_rows_shape(self.config)}

    def dtype(self, name: str, usual: torch.dtype) -> torch.dtype:
        """Of a tensor that is left out."""
        return torch.int64 if name.endswith("lfq.mask") else usual

    def neutral(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """For a tensor that is left out, where none was kept."""
        return neutral(name, self.left_out()[name], dtype)

    def reason(self, name: str) -> str:
        """Why a released tensor, or a part of it, is left out."""
        return "only the row of image_gen_start is ever read" if name == START_ROWS else reason_dropped(name)

    def stated(self, dtype: torch.dtype) -> dict[str, Any]:
        """A config.json as the release has it."""
        return to_release_config(self.config, dtype)
