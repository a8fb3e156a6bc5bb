"""VARGPT-v1.1: Qwen2-VL with a visual decoder for next-scale prediction and an image tokenizer.

One forward pass serves text and pictures. Image tokens travel through the language model (causal over every token)
in the places of ``image_gen_pad``; its states there feed the visual decoder, and its states before
``image_gen_start`` are the decoder's context (specification, sections 3 and 4).

Deviations from the published code: L image positions a picture, not L rounded up to a multiple of 128 (they cannot
influence the picture); text positions count real tokens and follow m-rope after an understood picture, in training
as in sampling; any number of drawn pictures a row; no state is kept on the module; stochastic training aids
(condition drop, drop path) are arguments, so that a scoring pass cannot meet them by accident.

Shape legend: B rows, T positions, H language-model width, N drawn pictures in the batch (row-major), L image tokens,
C decoder width, d bits a token.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import Cache
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLCausalLMOutputWithPast,
    Qwen2VLForConditionalGeneration,
)

from vargpt_rl.model.configuration import VargptConfig
from vargpt_rl.model.decoder import DecoderContext, VisualDecoder
from vargpt_rl.model.image_tokenizer import ImageTokenizer
from vargpt_rl.model.scales import schedule_for, token_count


class Projector(nn.Module):
    """Two linear layers with an exact GELU between: one way between decoder and language-model width."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.fc1 = nn.Linear(width_in, width_in)
        self.fc2 = nn.Linear(width_in, width_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Drawing(NamedTuple):
    """The drawn pictures of a batch for a teacher-forced pass.

    ``inputs_NLd`` are those of the scales after the first (L - 1 tokens); ``size`` is (height, width) in pixels;
    ``unconditional_N`` is True where the condition is dropped.
    """

    inputs_NLd: torch.Tensor
    size: tuple[int, int]
    unconditional_N: torch.Tensor | None = None
    drop_path: float = 0.0


@dataclass
class VargptOutput(Qwen2VLCausalLMOutputWithPast):
    """Adds ``image_logits`` float [N, L, 2d] (channel 2b + v: bit b has value v)."""

    image_logits: torch.Tensor | None = None


class Vargpt(Qwen2VLForConditionalGeneration):
    """The whole model. Without ``drawing`` it is Qwen2-VL, text generation included."""

    config_class = VargptConfig
    accepts_loss_kwargs = False  # losses are means: the trainer divides them by the accumulation steps

    def __init__(self, config: VargptConfig):
        super().__init__(config)
        width, hidden = config.decoder_config.width, config.text_config.hidden_size
        self.image_tokenizer = ImageTokenizer(config.image_tokenizer_config)
        self.projector_in = Projector(width, hidden)
        self.projector_out = Projector(hidden, width)
        self.image_decoder = VisualDecoder(config.decoder_config, config.image_tokenizer_config.bits)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        drawing: Drawing | None = None,
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
        Drawings are in the first block of their row.

        Raises ValueError when the pads do not fit the drawing. Without one, see ``Qwen2VLForConditionalGeneration``.
        """
        if attention_mask is None and input_ids is not None and past_key_values is None:
            attention_mask = torch.ones_like(input_ids)
        if drawing is None:
            if position_ids is None and past_key_values is None and input_ids is not None:
                attention_mask, position_ids = self._layout(input_ids, attention_mask, image_grid_thw, blocks)
            if blocks is not None:
                kwargs["use_cache"] = False  # with a cache transformers looks for no blocks
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                pixel_values=pixel_values,
                image_grid_thw=image_grid_thw,
                mm_token_type_ids=mm_token_type_ids,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        schedule = schedule_for(*drawing.size)
        first_N2 = self.find_drawings(input_ids, len(drawing.inputs_NLd), token_count(schedule))
        unconditional_N = drawing.unconditional_N
        if unconditional_N is None:
            unconditional_N = torch.zeros(len(first_N2), dtype=torch.bool, device=input_ids.device)
        condition = self.image_decoder.condition(unconditional_N)
        words_NLC = self.image_decoder.word_embedding(drawing.inputs_NLd.to(condition.start_N1C.dtype))
        drawn_NLH = self.projector_in(torch.cat([condition.start_N1C, words_NLC], dim=1))

        pads_BT = input_ids == self.config.image_gen_pad_token_id
        embeds_BTH = self.embed(input_ids, pixel_values, image_grid_thw)
        embeds_BTH = embeds_BTH.masked_scatter(pads_BT[..., None], drawn_NLH.to(embeds_BTH.dtype))
        mask_BT, position_ids = self._layout(input_ids, attention_mask, image_grid_thw, blocks)
        hidden_BTH = self.model.language_model(
            inputs_embeds=embeds_BTH,
            attention_mask=mask_BT,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state

        y_NLC = self.projector_out(hidden_BTH[pads_BT].view_as(drawn_NLH))
        context = self.context(hidden_BTH, attention_mask, first_N2)
        logits = self.image_decoder(y_NLC, condition, context, schedule, drawing.drop_path)
        return VargptOutput(logits=self.lm_head(hidden_BTH) if text_logits else None, image_logits=logits)

    def find_drawings(self, input_ids_BT: torch.Tensor, pictures: int, tokens: int) -> torch.Tensor:
        """int64 [N, 2]: row and position of the first ``image_gen_pad`` of each drawn picture.

        Raises ValueError unless the pads form exactly ``pictures`` runs of ``tokens``.
        """
        pads = (input_ids_BT == self.config.image_gen_pad_token_id).long()
        starts_N2 = (pads.diff(dim=1, prepend=pads.new_zeros(len(pads), 1)) == 1).nonzero()
        if len(starts_N2) != pictures or pads.sum() != pictures * tokens:
            raise ValueError(
                f"{len(starts_N2)} runs of image_gen_pad with {int(pads.sum())} tokens in all, "
                f"expected {pictures} pictures of {tokens} tokens"
            )
        return starts_N2

    def embed(self, input_ids_BT, pixel_values=None, image_grid_thw=None) -> torch.Tensor:
        """[B, T, H]: token embeddings, with understood pictures in the places of ``image_pad``."""
        embeds_BTH = self.get_input_embeddings()(input_ids_BT)
        if pixel_values is None:
            return embeds_BTH
        features = torch.cat(self.get_image_features(pixel_values, image_grid_thw).pooler_output)
        at_BT1 = (input_ids_BT == self.config.image_token_id)[..., None]
        if at_BT1.sum() != len(features):
            raise ValueError(f"{int(at_BT1.sum())} image_pad tokens, but the pictures have {len(features)} features")
        return embeds_BTH.masked_scatter(at_BT1, features.to(embeds_BTH.dtype))

    def positions(self, input_ids_BT, attention_mask_BT, image_grid_thw=None) -> torch.Tensor:
        """int64 [3, B, T]: m-rope positions (temporal, row, column); the same for training and sampling.

        Text, and drawn tokens, count up one by one from the first real token; an understood picture spans its grid.
        """
        if image_grid_thw is not None:
            is_picture_BT = (input_ids_BT == self.config.image_token_id).int()
            return self.model.get_rope_index(
                input_ids_BT, is_picture_BT, image_grid_thw=image_grid_thw, attention_mask=attention_mask_BT
            )[0]
        position_BT = (attention_mask_BT.long().cumsum(-1) - 1).clamp(min=0)
        return position_BT.expand(3, -1, -1)

    def _layout(self, input_ids_BT, attention_mask_BT, image_grid_thw, blocks_BT) -> tuple:
        """Attention mask and positions for the language model.

        Of packed rows transformers wants no mask and, before the m-rope positions, plain ones that begin anew with each
        block: [4, B, T]. Pads are a block of their own.
        """
        positions = self.positions(input_ids_BT, attention_mask_BT, image_grid_thw)
        if blocks_BT is None:
            return attention_mask_BT, positions
        place_BT = torch.arange(blocks_BT.shape[1], device=blocks_BT.device).expand_as(blocks_BT)
        begins_BT = blocks_BT.diff(dim=1, prepend=torch.full_like(blocks_BT[:, :1], -1)) != 0
        first_BT = (place_BT * begins_BT).cummax(1).values
        positions = positions - positions.gather(2, first_BT.expand_as(positions))
        return None, torch.cat([(place_BT - first_BT)[None], positions])

    def context(self, hidden_BTH, attention_mask_BT, first_N2) -> DecoderContext:
        """What each picture's cross attention sees: the projected states strictly before its ``image_gen_start``."""
        row_N, end_N = first_N2[:, 0], first_N2[:, 1] - 1
        longest = int(end_N.max())
        before_NT = torch.arange(longest, device=end_N.device) < end_N[:, None]
        states_NTC = self.projector_out(hidden_BTH[row_N, :longest])
        return DecoderContext(states_NTC, before_NT & attention_mask_BT[row_N, :longest].bool())
