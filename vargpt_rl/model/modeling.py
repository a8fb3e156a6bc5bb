"""VARGPT-v1.1: Qwen2-VL with a visual decoder for next-scale prediction and an image tokenizer.

The forward pass is in ``unified``; the states before ``image_gen_start`` are the decoder's context (specification,
section 4). Positions follow m-rope after an understood image, in training as in sampling.

Guidance uses the unconditional branch that the released weights were sampled with: its language model sees only the
tokens of the current scale, at positions from 0, while its visual decoder does remember earlier scales; its context is
the learned unconditional rows (specification, section 5). A prompt longer than these rows uses all of them; the
published code crashes.

Shape legend: B rows, T positions, H language-model width, C decoder width, N drawn images in the batch (row-major),
U unconditional rows, M rows of a guided drawing (conditional, then unconditional), n tokens of one scale, D logits a
token.
"""

import torch
import torch.nn.functional as F
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLForConditionalGeneration

from vargpt_rl.model.configuration import VargptConfig
from vargpt_rl.model.decoder import Condition, DecoderContext, VisualDecoder
from vargpt_rl.model.image_tokenizer import ImageTokenizer
from vargpt_rl.model.noise import SeededNoise
from vargpt_rl.model.unified import DrawnReader, Projector, Unified, text_positions

MERGED_TOKENS = 16
"""Tokens of a scale up to which guidance's two language-model passes are one. A short pass takes as long as reading
the weights; in a longer one, the scores that the mask hides cost more than that."""


class Vargpt(Unified, Qwen2VLForConditionalGeneration):
    """The whole model. Without ``drawing``, ``forward`` is Qwen2-VL's, text generation included."""

    config_class = VargptConfig
    image_weight = 3.0
    stacks = {
        "model.language_model.layers": ("text_config", "num_hidden_layers"),
        "model.visual.blocks": ("vision_config", "depth"),
        "image_decoder.blocks": ("decoder_config", "depth"),
    }
    vision_keys = ("image_grid_thw", "mm_token_type_ids")

    def __init__(self, config: VargptConfig):
        super().__init__(config)
        width, hidden = config.decoder_config.width, config.text_config.hidden_size
        self.image_tokenizer = ImageTokenizer(config.image_tokenizer_config)
        self.projector_in = Projector(width, hidden)
        self.projector_out = Projector(hidden, width)
        self.image_decoder = VisualDecoder(config.decoder_config, config.image_tokenizer_config.bits)
        self.post_init()

    def image_features(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None = None) -> torch.Tensor:
        """Encode understood images: [P, H], the merged patches of all of them."""
        return torch.cat(self.get_image_features(pixel_values, image_grid_thw).pooler_output)

    def blank_images(self, count: int, side: int) -> tuple[dict[str, torch.Tensor], int]:
        vision = self.config.vision_config
        merge, patch = vision.spatial_merge_size, vision.patch_size
        seen = max(1, round(side / (patch * merge)))
        channels = vision.in_channels * vision.temporal_patch_size * patch**2
        pixel_values = torch.zeros(count * (seen * merge) ** 2, channels, device=self.device, dtype=self.dtype)
        grids = torch.tensor([[1, seen * merge, seen * merge]] * count)
        return {"pixel_values": pixel_values, "image_grid_thw": grids}, seen**2

    def positions(self, input_ids_BT, attention_mask_BT, image_grid_thw=None) -> torch.Tensor:
        """Return m-rope positions (temporal, row, column), int64 [3, B, T].

        Text and drawn tokens count up one by one from the first real token; an understood image spans its grid.
        """
        if image_grid_thw is not None:
            is_image_BT = (input_ids_BT == self.config.image_token_id).int()
            return self.model.get_rope_index(
                input_ids_BT, is_image_BT, image_grid_thw=image_grid_thw, attention_mask=attention_mask_BT
            )[0]
        return text_positions(attention_mask_BT).expand(3, -1, -1)

    def block_positions(self, plain_BT: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Put the plain positions before the m-rope positions, as transformers expects for packed rows: [4, B, T]."""
        return torch.cat([plain_BT[None], positions])

    def context(self, hidden_BTH, attention_mask_BT, first_N2) -> DecoderContext:
        """Return the input of each image's cross attention: the projected states before its ``image_gen_start``."""
        row_N, end_N = first_N2[:, 0], first_N2[:, 1] - 1
        longest = int(end_N.max())
        before_NT = torch.arange(longest, device=end_N.device) < end_N[:, None]
        states_NTC = self.projector_out(hidden_BTH[row_N, :longest])
        return DecoderContext(states_NTC, before_NT & attention_mask_BT[row_N, :longest].bool())

    @staticmethod
    def guided(cfg: float) -> bool:
        return cfg != 1

    def start_drawing(
        self, context: DecoderContext | None, unconditional_M: torch.Tensor
    ) -> tuple[Condition, DecoderContext]:
        assert context is not None  # `context` returns one
        condition = self.image_decoder.condition(unconditional_M)
        if len(unconditional_M) == len(context.mask_NT):
            return condition, context
        rows_UC = self.image_decoder.condition.unconditional
        width = context.states_NTC.shape[1]
        lengths_B = context.mask_NT.sum(1).clamp(max=len(rows_UC))  # as many rows as the prompt has states
        states_TC = F.pad(rows_UC[:width], (0, 0, 0, max(0, width - len(rows_UC))))
        states_BTC = states_TC.to(context.states_NTC.dtype).expand(len(lengths_B), -1, -1)
        mask_BT = torch.arange(width, device=lengths_B.device) < lengths_B[:, None]
        both = torch.cat([context.states_NTC, states_BTC]), torch.cat([context.mask_NT, mask_BT])
        return condition, DecoderContext(*both)

    def drawing_states(self, reading: DrawnReader, embeds_MnH: torch.Tensor, noise: SeededNoise) -> torch.Tensor:
        """Run one scale through the language model: samples after their prompt, the unconditional branch without."""
        batch = reading.batch
        if len(embeds_MnH) > batch and embeds_MnH.shape[1] <= MERGED_TOKENS:
            return reading.read_drawn_beside(embeds_MnH[:batch], embeds_MnH[batch:])
        states = reading.read_drawn(embeds_MnH[:batch])
        if len(embeds_MnH) == batch:
            return states
        steps = torch.arange(embeds_MnH.shape[1], device=embeds_MnH.device)
        alone = self.model.language_model(
            inputs_embeds=embeds_MnH[batch:],
            position_ids=steps.expand(3, batch, -1),
            use_cache=False,
        ).last_hidden_state
        return torch.cat([states, alone])

    def guide(self, logits_MnD: torch.Tensor, cfg: float, progress: float) -> torch.Tensor:
        """Push the samples' logits away from the unconditional ones, equally at every scale."""
        conditional, unconditional = logits_MnD.chunk(2)
        return cfg * conditional + (1 - cfg) * unconditional
