"""Configuration of a VARGPT-v1.1 model: Qwen2-VL's own, plus the visual decoder and the image tokenizer.

Defaults are those of the release (7B language model, 2B visual decoder, d = 32 image tokenizer).
"""

from typing import TYPE_CHECKING

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLConfig

from vargpt_rl.model.multiscale import Symbols
from vargpt_rl.model.scales import schedule_for

# Qwen2-VL-7B's; transformers' own defaults are those of the 72B model.
RELEASE_LANGUAGE = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}


@strict
class DecoderConfig(PreTrainedConfig):
    """Configuration of the visual decoder (specification, section 4, step 8)."""

    model_type = "vargpt_decoder"
    base_config_key = "decoder_config"

    width: int = 2048
    depth: int = 32
    """Number of blocks."""
    heads: int = 16
    mlp_ratio: int = 4
    """Hidden width of the feed-forward layers, in multiples of ``width``."""
    max_scales: int = 15
    """Rows of the level embedding."""
    max_unconditional: int = 512
    """Learned unconditional rows, the first of which is also the dropped condition."""
    norm_eps: float = 1e-6


@strict
class ImageTokenizerConfig(PreTrainedConfig):
    """Configuration of the image tokenizer, a convolutional autoencoder (specification, section 2)."""

    model_type = "vargpt_image_tokenizer"
    base_config_key = "image_tokenizer_config"

    bits: int = 32
    """Bits per image token, d."""
    base_channels: int = 128
    channel_multipliers: list[int] | tuple[int, ...] = (1, 2, 4, 4, 4)
    """Channels of each level, fine to coarse, in multiples of ``base_channels``."""
    blocks_per_level: int = 2
    norm_groups: int = 32
    """Groups of the group norms."""

    schedule_for = staticmethod(schedule_for)

    @property
    def symbols(self) -> Symbols:
        """Format of an image token."""
        return Symbols(self.bits, 2)

    @property
    def latent_channels(self) -> int:
        """Channels of the latent map, d."""
        return self.bits


@strict
class VargptConfig(Qwen2VLConfig):
    """Configuration of a whole VARGPT-v1.1 model; the token ids are those of the release."""

    model_type = "vargpt"
    sub_configs = {
        **Qwen2VLConfig.sub_configs,
        "decoder_config": DecoderConfig,
        "image_tokenizer_config": ImageTokenizerConfig,
    }

    if TYPE_CHECKING:  # the types after __post_init__; `strict` checks those below before it
        decoder_config: DecoderConfig
        image_tokenizer_config: ImageTokenizerConfig
    else:
        decoder_config: dict | PreTrainedConfig | None = None
        image_tokenizer_config: dict | PreTrainedConfig | None = None
    image_gen_start_token_id: int = 151657
    image_gen_end_token_id: int = 151658
    image_gen_pad_token_id: int = 151659

    def __post_init__(self, **kwargs):
        if self.text_config is None:
            self.text_config = dict(RELEASE_LANGUAGE)
        if self.vision_config is None:
            self.vision_config = {"hidden_size": RELEASE_LANGUAGE["hidden_size"]}
        for key in ("decoder_config", "image_tokenizer_config"):
            value = getattr(self, key)
            if value is None or isinstance(value, dict):
                setattr(self, key, self.sub_configs[key](**(value or {})))
        super().__post_init__(**kwargs)


AutoConfig.register("vargpt", VargptConfig)
