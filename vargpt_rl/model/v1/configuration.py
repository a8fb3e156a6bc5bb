"""Configuration of a VARGPT v1 model: LLaVA-1.5's own, plus the visual decoder and the image tokenizer.

Defaults are those of the release: Vicuna-7B and CLIP ViT-L/14 at 336 px, VAR-d30, a codebook of 4096 entries, 256 px.
"""

from typing import TYPE_CHECKING

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.llava.configuration_llava import LlavaConfig

from vargpt_rl.model.multiscale import Symbols
from vargpt_rl.model.scales import STRIDE, Schedule

# Vicuna-7B-v1.5 with LLaVA's rows for special tokens.
RELEASE_LANGUAGE = {
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "pad_token_id": 32001,
}


@strict
class V1DecoderConfig(PreTrainedConfig):
    """Configuration of the visual decoder (specification, section 4, steps 2, 6 and 7)."""

    model_type = "vargpt_v1_decoder"
    base_config_key = "decoder_config"

    width: int = 1920
    depth: int = 30
    """Number of blocks."""
    heads: int = 30
    mlp_ratio: int = 4
    """Hidden width of the feed-forward layers, in multiples of ``width``."""
    norm_eps: float = 1e-6
    draws_unconditionally: bool = True
    """Sample images under the dropped condition, as the released code does, although training drops it one time in
    ten. Scoring follows it, so that the policy being aligned is the one being sampled."""


@strict
class V1ImageTokenizerConfig(PreTrainedConfig):
    """Configuration of the image tokenizer, a convolutional autoencoder with a codebook (specification, section 2)."""

    model_type = "vargpt_v1_image_tokenizer"
    base_config_key = "image_tokenizer_config"

    codes: int = 4096
    """Entries of the codebook, V."""
    latent_channels: int = 32
    """Channels of the latent map and of a code, d."""
    sides: list[int] | tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    """Side of each token grid. Positions are learned, so a model draws one size only: 16 pixels per token of the last
    grid."""
    residual_convs: int = 4
    """Number of smoothing convolutions, which neighbouring scales share."""
    residual_share: float = 0.5
    """Share of the convolution's output in what a scale adds; the rest is the upsampled code."""
    base_channels: int = 160
    channel_multipliers: list[int] | tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each level, fine to coarse, in multiples of ``base_channels``."""
    blocks_per_level: int = 2
    norm_groups: int = 32
    """Groups of the group norms."""

    @property
    def symbols(self) -> Symbols:
        """Format of an image token."""
        return Symbols(1, self.codes)

    def schedule_for(self, height: int, width: int | None = None) -> Schedule:
        """Return the grids of an image. Raises ValueError for any size but the model's own."""
        side = self.sides[-1] * STRIDE
        width = height if width is None else width
        if (height, width) != (side, side):
            raise ValueError(f"resolution {height}x{width}: this model draws {side}x{side} pixels only")
        return tuple((side, side) for side in self.sides)


@strict
class VargptV1Config(LlavaConfig):
    """Configuration of a whole VARGPT v1 model; the token ids are those of the release."""

    model_type = "vargpt_v1"
    sub_configs = {
        **LlavaConfig.sub_configs,
        "decoder_config": V1DecoderConfig,
        "image_tokenizer_config": V1ImageTokenizerConfig,
    }

    if TYPE_CHECKING:  # the types after __post_init__; `strict` checks those below before it
        decoder_config: V1DecoderConfig
        image_tokenizer_config: V1ImageTokenizerConfig
    else:
        decoder_config: dict | PreTrainedConfig | None = None
        image_tokenizer_config: dict | PreTrainedConfig | None = None
    image_gen_start_token_id: int = 32002
    image_gen_end_token_id: int = 32003
    image_gen_pad_token_id: int = 32004

    def __post_init__(self, **kwargs):
        if self.text_config is None:
            self.text_config = dict(RELEASE_LANGUAGE)
        for key in ("decoder_config", "image_tokenizer_config"):
            value = getattr(self, key)
            if value is None or isinstance(value, dict):
                setattr(self, key, self.sub_configs[key](**(value or {})))
        super().__post_init__(**kwargs)


AutoConfig.register("vargpt_v1", VargptV1Config)
