"""VARGPT v1: LLaVA-1.5 with a VAR decoder for next-scale prediction and an image tokenizer over a codebook.

The pass for text and images is ``unified``. With guidance, the unconditional branch has no language model: its states
are Gaussian noise, drawn afresh at every scale (VARGPT, section 7.6; specification, section 5), and its strength grows
from nothing at the first scale to the full one at the last.

Deviations from the published code (specification, section 9): images may be understood and drawn in one row; the
noise of each sample is drawn from that sample's seed.

Shape legend: B rows, T positions, H language-model width, M rows of a guided drawing (conditional, then unconditional),
n tokens of one scale, P patches of understood images, V codes.
"""

import torch
from transformers import Cache
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from vargpt_rl.model.unified import Drawing, MakesDrawing, Projector, Unified, VargptOutput, text_positions
from vargpt_rl.model.v1.configuration import VargptV1Config
from vargpt_rl.model.v1.decoder import V1Condition, V1VisualDecoder
from vargpt_rl.model.v1.image_tokenizer import V1ImageTokenizer


def gaussian_states(like_BnH: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
    """Standard normal noise [B, n, H], each sample's from its own generator."""
    noise = torch.stack([torch.randn(like_BnH.shape[1:], generator=g) for g in generators])
    return noise.to(like_BnH)


class VargptV1(Unified, LlavaForConditionalGeneration):
    """The whole model. Without ``drawing`` it is LLaVA-1.5, text generation included."""

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
        # Images are seen through the last but one layer of the vision tower.
        first = config.vision_config.num_hidden_layers + 1 + config.vision_feature_layer
        unused = range(first, config.vision_config.num_hidden_layers)
        self.unreached = (
            "model.vision_tower.post_layernorm.",
            *(f"model.vision_tower.encoder.layers.{layer}." for layer in unused),
        )
        self.draws_unconditionally = config.decoder_config.draws_unconditionally
        self.post_init()

    def save_pretrained(self, *args, **kwargs) -> None:
        """Saves under the names that the tensors have here; transformers would go back to LLaVA's first ones."""
        super().save_pretrained(*args, **{"save_original_format": False} | kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        drawing: Drawing | MakesDrawing | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        text_logits: bool = True,
        blocks: torch.Tensor | None = None,
        **kwargs,
    ) -> VargptOutput:
        """Teacher-forced pass when there is a ``drawing``: int64 [B, T] ids with N runs of L ``image_gen_pad``.

        ``blocks`` int64 [B, T] says which of the texts that share a row each token is of: they do not see one another.
        Drawings and understood images are in rows of one block.

        Raises ValueError when the pads do not fit the drawing. Without one, see ``LlavaForConditionalGeneration``;
        the grid and the token types of understood images, all of one size, say nothing here.
        """
        if attention_mask is None and input_ids is not None and past_key_values is None:
            attention_mask = torch.ones_like(input_ids)
        if drawing is None:
            if position_ids is None and past_key_values is None and input_ids is not None:
                attention_mask, position_ids = self.layout(input_ids, attention_mask, None, blocks)
            if blocks is not None:
                kwargs["use_cache"] = False  # with a cache transformers looks for no blocks
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                pixel_values=pixel_values,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        return self.teacher_forced(
            input_ids, attention_mask, drawing, pixel_values, image_grid_thw, text_logits, blocks
        )

    def image_features(self, pixel_values: torch.Tensor, image_grid_thw=None) -> torch.Tensor:
        """[P, H]: the patches of all understood images."""
        return torch.cat(list(self.get_image_features(pixel_values).pooler_output))

    def blank_images(self, count: int, side: int) -> tuple[dict[str, torch.Tensor], int]:
        vision = self.config.vision_config
        cells = vision.image_size // vision.patch_size
        pixel_values = torch.zeros(count, 3, *[vision.image_size] * 2, device=self.device, dtype=self.dtype)
        grids = torch.tensor([[1, cells, cells]] * count)
        return {"pixel_values": pixel_values, "image_grid_thw": grids}, cells**2

    def positions(self, input_ids_BT, attention_mask_BT, image_grid_thw=None) -> torch.Tensor:
        """int64 [B, T]; the same for training and sampling, and for text and images."""
        return text_positions(attention_mask_BT)

    def block_positions(self, plain_BT: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Of packed rows."""
        return plain_BT

    def context(self, hidden_BTH, attention_mask_BT, first_N2) -> None:
        """The decoder sees nothing of the prompt but the states of the image tokens."""

    @staticmethod
    def guided(cfg: float) -> bool:
        """Whether this strength needs the unconditional branch."""
        return cfg != 0

    def start_drawing(self, context: None, unconditional_M: torch.Tensor) -> tuple[V1Condition, None]:
        """Condition of each row; there is no context."""
        return self.image_decoder.condition(unconditional_M), None

    def drawing_states(self, reading, embeds_MnH: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        """One scale through the language model for the samples; noise in the place of its states for the others."""
        states = reading.read_drawn(embeds_MnH[: reading.batch])
        if len(embeds_MnH) == reading.batch:
            return states
        return torch.cat([states, gaussian_states(states, generators)])

    def guide(self, logits_MnV: torch.Tensor, cfg: float, progress: float) -> torch.Tensor:
        """Logits of the samples, led away from the unconditional ones, by more at each scale."""
        conditional, unconditional = logits_MnV.chunk(2)
        strength = cfg * progress
        return (1 + strength) * conditional - strength * unconditional
