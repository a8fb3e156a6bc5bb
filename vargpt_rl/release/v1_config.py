"""Convert the released v1 checkpoint's config.json to this model's configuration and back.

The release's file describes the language model and the vision tower as LLaVA-1.5's does, and the special tokens. The
sizes of the decoder and the image tokenizer are inferred from the tensors' shapes. Values that no shape determines (the
sides of the grids, norm groups) come from ``decoder_config`` and ``image_tokenizer_config`` if the file has them, as
those written here do, and otherwise from the release.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from vargpt_rl.model.v1.configuration import V1DecoderConfig, V1ImageTokenizerConfig, VargptV1Config
from vargpt_rl.release import v1_names as release
from vargpt_rl.release.v1_1_config import NEW_TOKENS, Shapes, dtype_name, matches, own_settings, usual

MODEL_TYPE = "vargpt_llava"

_TEXT_KEYS = set(LlamaConfig.__annotations__) - {"rope_parameters"} - {"model_type", "keys_to_ignore_at_inference"}
_VISION_KEYS = set(CLIPVisionConfig.__annotations__) - {"model_type", "base_config_key"}
_LLAVA_KEYS = (
    "image_token_index",
    "image_seq_length",
    "projector_hidden_act",
    "vision_feature_select_strategy",
    "vision_feature_layer",
    "tie_word_embeddings",
)


def decoder_config(shapes: Shapes, stated: dict[str, Any]) -> V1DecoderConfig:
    """Infer the decoder's configuration from the shapes of ``vargpt_gen.*``."""
    name = r"vargpt_gen\.blocks\.(\d+)"
    biases, scales = matches(shapes, rf"{name}\.attn\.v_bias"), matches(shapes, rf"{name}\.attn\.scale_mul_1H11")
    hidden = matches(shapes, rf"{name}\.ffn\.fc1\.bias")
    width = usual((shape[0] for _, shape in biases), "vargpt_gen.blocks.*.attn.v_bias")
    sizes = {
        "width": width,
        "depth": len({match[1] for match, _ in biases}),
        "heads": usual((math.prod(shape) for _, shape in scales), "vargpt_gen.blocks.*.attn.scale_mul_1H11"),
        "mlp_ratio": usual((shape[0] for _, shape in hidden), "vargpt_gen.blocks.*.ffn.fc1.bias") // width,
    }
    return V1DecoderConfig(**stated | sizes)


def image_tokenizer_config(shapes: Shapes, stated: dict[str, Any]) -> V1ImageTokenizerConfig:
    """Infer the image tokenizer's configuration from the shapes of ``vae_local.*``."""
    name = "vae_local.encoder.down.*.block.*.conv*.bias"
    parts = matches(shapes, r"vae_local\.encoder\.down\.(\d+)\.block\.(\d+)\.(conv[12]|norm2)\.(weight|bias)")
    levels = max(1, len({match[1] for match, _ in parts}))
    widths = [usual((shape[0] for match, shape in parts if match[1] == str(i)), name) for i in range(levels)]
    base = math.gcd(*widths)
    heads = matches(shapes, r"(vargpt_gen\.head\.(weight|bias)|vae_local\.quantize\.embedding\.weight)")
    ends = matches(shapes, r"vae_local\.((post_)?quant_conv|quantize\.quant_resi\.qresi_ls\.\d+)\.(weight|bias)")
    convs = {name for name in shapes if name.startswith("vae_local.quantize.quant_resi.qresi_ls.")}
    sizes = {
        "codes": usual((shape[0] for _, shape in heads), "vae_local.quantize.embedding.weight"),
        "latent_channels": usual((shape[0] for _, shape in ends), "vae_local.quant_conv.weight"),
        "residual_convs": len({name.split(".")[4] for name in convs}),
        "base_channels": base,
        "channel_multipliers": [width // base for width in widths],
        "blocks_per_level": len({match[2] for match, _ in parts}),
    }
    return V1ImageTokenizerConfig(**stated | sizes)


def from_release_config(written: dict[str, Any], shapes: Shapes, dtype: torch.dtype) -> VargptV1Config:
    """Return our configuration. Raises ValueError naming the key or tensor that is wrong or missing.

    ``written`` is the released config.json, or a record of test data with it under ``hf_config``.
    """
    stated = written.get("hf_config", written)
    if stated.get("model_type") != MODEL_TYPE:
        raise ValueError(f"config.json: model_type is {stated.get('model_type')!r}, expected {MODEL_TYPE!r}")
    text, vision = ({**stated.get(part, {})} for part in ("text_config", "vision_config"))
    if text.get("rope_scaling"):
        raise ValueError(f"config.json: text_config.rope_scaling is {text['rope_scaling']}, expected none")
    rope = {"rope_type": "default", "rope_theta": text.get("rope_theta", 1e4)}
    tokens = stated.get("special_tokens", {})
    ids = {f"{name}_token_id": tokens[f"{name}_token_id"] for name in NEW_TOKENS if f"{name}_token_id" in tokens}
    pad = {"pad_token_id": stated["pad_token_id"]} if "pad_token_id" in stated else {}
    return VargptV1Config(
        text_config={key: text[key] for key in _TEXT_KEYS if key in text} | {"rope_parameters": rope} | pad,
        vision_config={key: vision[key] for key in _VISION_KEYS if key in vision},
        decoder_config=decoder_config(shapes, stated.get("decoder_config", {})),
        image_tokenizer_config=image_tokenizer_config(shapes, stated.get("image_tokenizer_config", {})),
        dtype=dtype_name(dtype),
        architectures=["VargptV1"],
        **{key: stated[key] for key in _LLAVA_KEYS if key in stated},
        **ids,
    )


def to_release_config(config: VargptV1Config, dtype: torch.dtype) -> dict[str, Any]:
    """Make a config.json in the release's format for a model that was not converted from one."""
    text, vision = config.text_config, config.vision_config
    special = {name: f"<|{name}|>" for name in NEW_TOKENS}
    special |= {f"{name}_token_id": getattr(config, f"{name}_token_id") for name in NEW_TOKENS}
    return {
        "architectures": ["VARGPTLlavaForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "torch_dtype": dtype_name(dtype),
        **{key: getattr(config, key) for key in _LLAVA_KEYS},
        "pad_token_id": text.pad_token_id,
        "text_config": {key: getattr(text, key) for key in sorted(_TEXT_KEYS)}
        | {"rope_theta": text.rope_parameters["rope_theta"], "model_type": "llama"},
        "vision_config": {key: getattr(vision, key) for key in sorted(_VISION_KEYS)}
        | {"model_type": "clip_vision_model"},
        "special_tokens": special,
        "decoder_config": own_settings(config.decoder_config),
        "image_tokenizer_config": own_settings(config.image_tokenizer_config),
    }


@dataclass(frozen=True)
class V1Release:
    """The published layout of one v1 model's tensors; see ``Release`` of v1.1 for the methods."""

    config: VargptV1Config
    model_type = MODEL_TYPE
    rows = release.ROWS
    our_rows = release.OUR_ROWS

    @classmethod
    def of_released(cls, stated: dict[str, Any], shapes: Shapes, dtype: torch.dtype) -> "V1Release":
        return cls(from_release_config(stated, shapes, dtype))

    @classmethod
    def of_model(cls, config: VargptV1Config, kept: Iterable[str]) -> "V1Release":
        return cls(config)

    def name(self, ours: str) -> str:
        return release.release_name(ours, self.config)

    def left_out(self) -> Shapes:
        return release.dropped_shapes(self.config)

    def dtype(self, name: str, usual: torch.dtype) -> torch.dtype:
        return release.dropped_dtype(name, usual)

    def neutral(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return release.neutral(name, self.left_out()[name], dtype, self.config)

    def reason(self, name: str) -> str:
        reason = release.reason_dropped(name)
        assert reason is not None, f"{name} is not left out"
        return reason

    def stated(self, dtype: torch.dtype) -> dict[str, Any]:
        return to_release_config(self.config, dtype)
