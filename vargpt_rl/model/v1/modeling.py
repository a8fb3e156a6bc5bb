"""VARGPT v1: LLaVA-1.5 with a VAR decoder for next-scale prediction and an image tokenizer over a codebook.

The forward pass is in ``unified``. Guidance uses an unconditional branch without a language model: its states are
Gaussian noise, new at every scale (VARGPT, section 7.6; specification, section 5). The guidance strength grows from 0
at the first scale to its full value at the last.

Deviations from the published code (specification, section 9): images may be understood and drawn in one row; the
noise of each sample comes from that sample's seed.

Shape legend: B rows, T positions, H language-model width, M rows of a guided drawing (conditional, then unconditional),
n tokens of one scale, P patches of understood images, V codes.
"""

import torch
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from vargpt_rl.model.decoder import DecoderContext
from vargpt_rl.model.noise import SeededNoise
from vargpt_rl.model.unified import DrawnReader, Projector, Unified, text_positions
from vargpt_rl.model.v1.configuration import VargptV1Config
from vargpt_rl.model.v1.decoder import V1Condition, V1VisualDecoder
from vargpt_rl.model.v1.image_tokenizer import V1ImageTokenizer


def gaussian_states(like_BnH: torch.Tensor, noise: SeededNoise) -> torch.Tensor:
    """Draw standard normal noise [B, n, H], each sample's from its own seed."""
    return noise.normal(*like_BnH.shape[1:]).to(like_BnH)


class VargptV1(Unified, LlavaForConditionalGeneration):
    """The whole model. Without ``drawing``, ``forward`` is LLaVA-1.5's, text generation included."""

    config_class = VargptV1Config
    image_weight = 1.0
    stacks = {
        "model.language_model.layers": ("text_config", "num_hidden_layers"),
        "model.vision_tower.encoder.layers": ("vision_config", "num_hidden_layers"),
        "image_decoder.blocks": ("decoder_config", "depth"),
    }

    def __init__(self, config: VargptV1Config):
        super().__init__(config)
        width, hidden = config.decoder_config.width, config.text_config.hidden_size
        self.image_tokenizer = V1ImageTokenizer(config.image_tokenizer_config)
        self.projector_in = Projector(width, hidden)
        self.projector_out = Projector(hidden, width)
        self.image_decoder = V1VisualDecoder(config.decoder_config, config.image_tokenizer_config)
        # Features are those of the last but one layer of the vision tower.
        first = config.vision_config.num_hidden_layers + 1 + config.vision_feature_layer
        unused = range(first, config.vision_config.num_hidden_layers)
        self.unreached = (
            "model.vision_tower.post_layernorm.",
            *(f"model.vision_tower.encoder.layers.{layer}." for layer in unused),
        )
        self.draws_unconditionally = config.decoder_config.draws_unconditionally
        self.post_init()

    def save_pretrained(self, *args, **kwargs) -> None:
        """Save tensors under their current names; transformers would restore LLaVA's original ones."""
        super().save_pretrained(*args, **{"save_original_format": False} | kwargs)

    def image_features(self, pixel_values: torch.Tensor, image_grid_thw=None) -> torch.Tensor:
        """Encode understood images: [P, H], the patches of all of them; their grids are not needed."""
        return torch.cat(list(self.get_image_features(pixel_values).pooler_output))

    def blank_images(self, count: int, side: int) -> tuple[dict[str, torch.Tensor], int]:
        vision = self.config.vision_config
        cells = vision.image_size // vision.patch_size
        pixel_values = torch.zeros(count, 3, *[vision.image_size] * 2, device=self.device, dtype=self.dtype)
        grids = torch.tensor([[1, cells, cells]] * count)
        return {"pixel_values": pixel_values, "image_grid_thw": grids}, cells**2

    def positions(self, input_ids_BT, attention_mask_BT, image_grid_thw=None) -> torch.Tensor:
        """Count positions one by one for text and images alike: int64 [B, T]."""
        return text_positions(attention_mask_BT)

    def block_positions(self, plain_BT: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return plain_BT

    def context(self, hidden_BTH, attention_mask_BT, first_N2) -> None:
        """Return None: the decoder sees the prompt only through the states of the image tokens."""

    @staticmethod
    def guided(cfg: float) -> bool:
        return cfg != 0

    def start_drawing(self, context: DecoderContext | None, unconditional_M: torch.Tensor) -> tuple[V1Condition, None]:
        return self.image_decoder.condition(unconditional_M), None

    def drawing_states(self, reading: DrawnReader, embeds_MnH: torch.Tensor, noise: SeededNoise) -> torch.Tensor:
        """Run one scale through the language model for the samples; the unconditional branch gets noise instead."""
        states = reading.read_drawn(embeds_MnH[: reading.batch])
        if len(embeds_MnH) == reading.batch:
            return states
        return torch.cat([states, gaussian_states(states, noise)])

    def guide(self, logits_MnV: torch.Tensor, cfg: float, progress: float) -> torch.Tensor:
        """Push the samples' logits away from the unconditional ones, more at each scale."""
        conditional, unconditional = logits_MnV.chunk(2)
        strength = cfg * progress
        return (1 + strength) * conditional - strength * unconditional
