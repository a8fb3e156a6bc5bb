"""What the families share: one forward pass for text and drawn images.

Image tokens travel through the language model (causal over every token) in the places of ``image_gen_pad``; its states
there feed the visual decoder (specification, sections 3 and 4).

Deviations from the published code, in both families: L image positions an image and no more; text positions count real
tokens; any number of drawn images a row, beside understood ones; no state is kept on the module; stochastic training
aids (condition drop, drop path) are arguments, so that a scoring pass cannot meet them by accident.

Shape legend: B rows, T positions, H language-model width, N drawn images in the batch (row-major), L image tokens,
C decoder width, d latent channels, s symbols a token, M rows of a guided drawing, n tokens of one scale.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from vargpt_rl.model.scales import token_count


class Projector(nn.Module):
    """Two linear layers with an exact GELU between: one way between decoder and language-model width."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.fc1 = nn.Linear(width_in, width_in)
        self.fc2 = nn.Linear(width_in, width_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Drawing(NamedTuple):
    """The drawn images of a batch for a teacher-forced pass.

    ``inputs_NLd`` are those of the scales after the first (L - 1 tokens); ``size`` is (height, width) in pixels;
    ``unconditional_N`` is True where the condition is dropped, None for what the family samples with.
    """

    inputs_NLd: torch.Tensor
    size: tuple[int, int]
    unconditional_N: torch.Tensor | None = None
    drop_path: float = 0.0
    labels_NLs: torch.Tensor | None = None
    scales: int | None = None
    """Number of coarse scales in the pass, None for all: no scale depends on finer ones, so these may be left out."""


@dataclass
class VargptOutput(CausalLMOutputWithPast):
    """Adds ``image_logits`` float [N, L, s * values] (see ``Symbols``), and the drawing's labels where it has any."""

    image_logits: torch.Tensor | None = None
    image_labels: torch.Tensor | None = None


def replayed(labels_NLs: torch.Tensor, size: tuple[int, int], scales: int | None = None) -> "MakesDrawing":
    """The drawing of stored labels, its inputs still to be worked out by the model (see ``Unified.teacher_forced``).

    With ``scales``, the labels and the pass are limited to that many coarse scales.
    """
    return partial(_replayed, labels_NLs, size, scales)


def _replayed(labels_NLs: torch.Tensor, size: tuple[int, int], scales: int | None, model: "Unified") -> Drawing:
    tokenizer = model.image_tokenizer
    inputs_NLd = tokenizer.replay(labels_NLs, tokenizer.schedule_for(*size), model.dtype, scales).inputs_BLd
    return Drawing(inputs_NLd, size, labels_NLs=labels_NLs, scales=scales)


class Unified:
    """Mixed into a family's language-and-vision model, which has these parts besides its own:

    ``image_tokenizer``, ``projector_in``, ``projector_out`` and ``image_decoder``. A family also says how it reads
    images (``image_features``), counts positions (``positions``, ``block_positions``), what its decoder sees of the
    prompt (``context``) and how it is guided (``guided``, ``start_drawing``, ``drawing_states``, ``guide``).
    """

    accepts_loss_kwargs = False  # losses are means: the trainer divides them by the accumulation steps
    image_weight: float
    """Weight of the image loss beside the text loss in supervised training."""
    stacks: dict[str, tuple[str, str]]
    """Each stack of equal blocks, and where the configuration says how many they are."""
    unreached: tuple[str, ...] = ()
    """What the names of parameters begin with that no loss depends on."""
    draws_unconditionally = False
    """Whether images are sampled, and scored, under the dropped condition."""

    def blank_images(self, count: int, side: int) -> tuple[dict[str, torch.Tensor], int]:
        """``pixel_values`` of zeros and ``image_grid_thw`` of images to be shown, and how many features each has.

        ``side``: of an image in pixels, where the family shows more than one size.
        """
        raise NotImplementedError

    def teacher_forced(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        drawing: "Drawing | MakesDrawing",
        pixel_values: torch.Tensor | None,
        image_grid_thw: torch.Tensor | None,
        text_logits: bool,
        blocks: torch.Tensor | None,
    ) -> VargptOutput:
        """One pass over int64 [B, T] ids with N runs of L ``image_gen_pad``; ``blocks`` as in ``forward``.

        What needs the image tokenizer's weights comes as a function of the model, for it is inside the pass that ZeRO-3
        has them at hand. Raises ValueError when the pads do not fit the drawing.
        """
        if not isinstance(drawing, Drawing):
            drawing = drawing(self)
        schedule = self.image_tokenizer.schedule_for(*drawing.size)
        tokens = token_count(schedule[: drawing.scales])
        first_N2 = self.find_drawings(input_ids, len(drawing.inputs_NLd), tokens)
        unconditional_N = drawing.unconditional_N
        if unconditional_N is None:
            unconditional_N = torch.full((len(first_N2),), self.draws_unconditionally, device=input_ids.device)
        condition = self.image_decoder.condition(unconditional_N)
        words_NLC = self.image_decoder.words(drawing.inputs_NLd.to(condition.start_N1C.dtype), slice(1, tokens))
        drawn_NLH = self.projector_in(torch.cat([condition.start_N1C, words_NLC], dim=1))

        pads_BT = input_ids == self.config.image_gen_pad_token_id
        embeds_BTH = self.embed(input_ids, pixel_values, image_grid_thw)
        embeds_BTH = embeds_BTH.masked_scatter(pads_BT[..., None], drawn_NLH.to(embeds_BTH.dtype))
        mask_BT, position_ids = self.layout(input_ids, attention_mask, image_grid_thw, blocks)
        hidden_BTH = self.model.language_model(
            inputs_embeds=embeds_BTH,
            attention_mask=mask_BT,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state

        y_NLC = self.projector_out(hidden_BTH[pads_BT].view_as(drawn_NLH))
        context = self.context(hidden_BTH, attention_mask, first_N2)
        logits = self.image_decoder(y_NLC, condition, context, schedule, drawing.drop_path, tokens=slice(tokens))
        words = self.lm_head(hidden_BTH) if text_logits else None
        return VargptOutput(logits=words, image_logits=logits, image_labels=drawing.labels_NLs)

    def layout(self, input_ids_BT, attention_mask_BT, image_grid_thw, blocks_BT) -> tuple:
        """Attention mask and positions for the language model.

        Of packed rows transformers wants no mask and positions that begin anew with each block. Pads are a block of
        their own.
        """
        positions = self.positions(input_ids_BT, attention_mask_BT, image_grid_thw)
        if blocks_BT is None:
            return attention_mask_BT, positions
        place_BT = torch.arange(blocks_BT.shape[1], device=blocks_BT.device).expand_as(blocks_BT)
        begins_BT = blocks_BT.diff(dim=1, prepend=torch.full_like(blocks_BT[:, :1], -1)) != 0
        first_BT = (place_BT * begins_BT).cummax(1).values
        positions = positions - positions.gather(-1, first_BT.expand_as(positions))
        return None, self.block_positions(place_BT - first_BT, positions)

    def find_drawings(self, input_ids_BT: torch.Tensor, images: int, tokens: int) -> torch.Tensor:
        """int64 [N, 2]: row and position of the first ``image_gen_pad`` of each drawn image.

        Raises ValueError unless the pads form exactly ``images`` runs of ``tokens``.
        """
        pads = (input_ids_BT == self.config.image_gen_pad_token_id).long()
        starts_N2 = (pads.diff(dim=1, prepend=pads.new_zeros(len(pads), 1)) == 1).nonzero()
        if len(starts_N2) != images or pads.sum() != images * tokens:
            raise ValueError(
                f"{len(starts_N2)} runs of image_gen_pad with {int(pads.sum())} tokens in all, "
                f"expected {images} images of {tokens} tokens"
            )
        return starts_N2

    def embed(self, input_ids_BT, pixel_values=None, image_grid_thw=None) -> torch.Tensor:
        """[B, T, H]: token embeddings, with understood images in the places of ``image_pad``."""
        embeds_BTH = self.get_input_embeddings()(input_ids_BT)
        if pixel_values is None:
            return embeds_BTH
        features = self.image_features(pixel_values, image_grid_thw)
        at_BT1 = (input_ids_BT == self.config.image_token_id)[..., None]
        if at_BT1.sum() != len(features):
            raise ValueError(f"{int(at_BT1.sum())} image_pad tokens, but the images have {len(features)} features")
        return embeds_BTH.masked_scatter(at_BT1, features.to(embeds_BTH.dtype))


MakesDrawing = Callable[[Unified], Drawing]


def text_positions(attention_mask_BT: torch.Tensor) -> torch.Tensor:
    """int64 [B, T]: from the first real token of each row, one by one."""
    return (attention_mask_BT.long().cumsum(-1) - 1).clamp(min=0)
