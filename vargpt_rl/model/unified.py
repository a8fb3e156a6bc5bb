"""The forward pass for text and images that both families of the model share.

Image tokens pass through the language model (causal over every token) at the positions of ``image_gen_pad``; its states
there are the visual decoder's input (specification, sections 3 and 4).

Deviations from the published code, in both families: exactly L positions per image; text positions count real tokens
only; any number of drawn images per row, along with understood ones; no state on the module; stochastic regularisation
(condition drop, drop path) is an argument, so a scoring pass cannot use it by accident.

Shape legend: B rows, T positions, H language-model width, N drawn images in the batch (row-major), L image tokens,
C decoder width, d latent channels, s symbols and D logits a token, M rows of a guided drawing, n tokens of one scale.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from vargpt_rl.model.decoder import DecoderContext
from vargpt_rl.model.noise import SeededNoise
from vargpt_rl.model.scales import token_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel as MixedInto

else:
    MixedInto = object


class Projector(nn.Module):
    """Two linear layers with an exact GELU between them; maps decoder width to language-model width, or back."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.fc1 = nn.Linear(width_in, width_in)
        self.fc2 = nn.Linear(width_in, width_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Drawing(NamedTuple):
    """The drawn images of a batch in a teacher-forced pass."""

    inputs_NLd: torch.Tensor
    """Decoder inputs of the scales after the first (L - 1 tokens)."""
    size: tuple[int, int]
    """(height, width) in pixels."""
    unconditional_N: torch.Tensor | None = None
    """True where the condition is dropped; None for the condition that the family samples with."""
    drop_path: float = 0.0
    """Stochastic depth of the last decoder block."""
    labels_NLs: torch.Tensor | None = None
    """Labels of the image tokens, if they are known; returned with the output."""
    scales: int | None = None
    """Number of coarse scales in the pass, None for all: no scale depends on finer ones, so these may be left out."""


@dataclass
class VargptOutput(CausalLMOutputWithPast):
    """Adds ``image_logits`` float [N, L, s * values] (see ``Symbols``), the drawing's labels, if any, and the language
    model's ``states`` [B, T, H]."""

    image_logits: torch.Tensor | None = None
    image_labels: torch.Tensor | None = None
    states: torch.Tensor | None = None


def replayed(labels_NLs: torch.Tensor, size: tuple[int, int], scales: int | None = None) -> "MakesDrawing":
    """Make a drawing from stored labels; the model computes its inputs during the pass.

    With ``scales``, the labels and the pass are limited to that many coarse scales.
    """
    return partial(_replayed, labels_NLs, size, scales)


def _replayed(labels_NLs: torch.Tensor, size: tuple[int, int], scales: int | None, model: "Unified") -> Drawing:
    tokenizer = model.image_tokenizer
    inputs_NLd = tokenizer.replay(labels_NLs, tokenizer.schedule_for(*size), model.dtype, scales).inputs_BLd
    return Drawing(inputs_NLd, size, labels_NLs=labels_NLs, scales=scales)


class DrawnReader(Protocol):
    """The language model of a generation under way: it reads tokens as they are drawn, ``batch`` rows at once."""

    batch: int

    def read_drawn(self, embeds_BnH: torch.Tensor) -> torch.Tensor:
        """Read drawn tokens and return their states [B, n, H]."""
        ...

    def read_drawn_beside(self, embeds_BnH: torch.Tensor, alone_BnH: torch.Tensor) -> torch.Tensor:
        """Read drawn tokens, and in the same pass others that see only themselves: [2B, n, H]."""
        ...


class Unified(ABC, MixedInto):
    """The part of a model that its families share, mixed into transformers' language-and-vision model of the family.

    A family's constructor makes ``image_tokenizer``, ``projector_in``, ``projector_out`` and ``image_decoder``.
    """

    accepts_loss_kwargs = False  # losses are means: the trainer divides them by the accumulation steps
    image_weight: float
    """Weight of the image loss relative to the text loss in supervised training."""
    stacks: dict[str, tuple[str, str]]
    """Each stack of equal blocks, and the configuration section and key that hold its depth."""
    vision_keys: tuple[str, ...] = ()
    """Arguments about understood images that the transformers model takes besides ``pixel_values``."""
    unreached: tuple[str, ...] = ()
    """Name prefixes of parameters that no loss depends on."""
    draws_unconditionally = False
    """True if images are sampled, and scored, under the dropped condition."""

    @abstractmethod
    def image_features(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None = None) -> torch.Tensor:
        """Encode understood images: [P, H], the features of all of them in order."""

    @abstractmethod
    def blank_images(self, count: int, side: int) -> tuple[dict[str, torch.Tensor], int]:
        """Make ``pixel_values`` of zeros and ``image_grid_thw`` of understood images; also the features of each.

        ``side`` is the side of an image in pixels, if the family takes more than one size.
        """

    @abstractmethod
    def positions(
        self, input_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor, image_grid_thw: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Number the positions of rows, int64 [..., B, T]; the same in training and sampling."""

    @abstractmethod
    def block_positions(self, plain_BT: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Combine plain positions and the family's own into what transformers expects for packed rows."""

    @abstractmethod
    def context(
        self, hidden_BTH: torch.Tensor, attention_mask_BT: torch.Tensor, first_N2: torch.Tensor
    ) -> DecoderContext | None:
        """Return what the decoder sees of each prompt; ``first_N2`` are row and position of the images' first token."""

    @staticmethod
    @abstractmethod
    def guided(cfg: float) -> bool:
        """Tell whether guidance of this strength needs the unconditional branch."""

    @abstractmethod
    def start_drawing(self, context: DecoderContext | None, unconditional_M: torch.Tensor) -> tuple:
        """Return condition and context of each row, given the context of the conditional ones.

        ``unconditional_M`` is True where the condition is dropped.
        """

    @abstractmethod
    def drawing_states(self, reading: "DrawnReader", embeds_MnH: torch.Tensor, noise: SeededNoise) -> torch.Tensor:
        """Return the states [M, n, H] of one scale: of the samples, then of their unconditional branch, if any."""

    @abstractmethod
    def guide(self, logits_MnD: torch.Tensor, cfg: float, progress: float) -> torch.Tensor:
        """Combine conditional and unconditional logits: [B, n, D]. ``progress`` grows from 0 to 1 over the scales."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        drawing: "Drawing | MakesDrawing | None" = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        text_logits: bool = True,
        blocks: torch.Tensor | None = None,
        states: torch.Tensor | None = None,
        **kwargs,
    ) -> VargptOutput:
        """Run a teacher-forced pass if there is a ``drawing``, else the transformers model that this is mixed into.

        With a drawing, the int64 [B, T] ids contain N runs of L ``image_gen_pad``; raises ValueError if they do not
        fit it. ``blocks`` int64 [B, T] numbers the texts that share a row: they do not attend to one another. In v1.1
        drawings are in the first block of their row; in v1 drawings and understood images are in rows of one block.
        With ``states`` [B, T, H] of an earlier pass over the same rows, the language model is not run.
        """
        if attention_mask is None and input_ids is not None and past_key_values is None:
            attention_mask = torch.ones_like(input_ids)
        if drawing is not None:
            assert input_ids is not None and attention_mask is not None  # drawings are in rows of token ids
            return self._teacher_forced(
                input_ids, attention_mask, drawing, pixel_values, image_grid_thw, text_logits, blocks, states
            )
        if position_ids is None and past_key_values is None and input_ids is not None:
            attention_mask, position_ids = self.layout(input_ids, attention_mask, image_grid_thw, blocks)
        if blocks is not None:
            kwargs["use_cache"] = False  # with a cache transformers ignores blocks
        vision = {"image_grid_thw": image_grid_thw, "mm_token_type_ids": mm_token_type_ids}
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **{key: vision[key] for key in self.vision_keys},
            **kwargs,
        )

    def _teacher_forced(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        drawing: "Drawing | MakesDrawing",
        pixel_values: torch.Tensor | None,
        image_grid_thw: torch.Tensor | None,
        text_logits: bool,
        blocks: torch.Tensor | None,
        states: torch.Tensor | None,
    ) -> VargptOutput:
        if not isinstance(drawing, Drawing):
            drawing = drawing(self)  # inside the pass, where ZeRO-3 has gathered the image tokenizer's weights
        schedule = self.image_tokenizer.schedule_for(*drawing.size)
        tokens = token_count(schedule[: drawing.scales])
        first_N2 = self.find_drawings(input_ids, len(drawing.inputs_NLd), tokens)
        unconditional_N = drawing.unconditional_N
        if unconditional_N is None:
            unconditional_N = torch.full((len(first_N2),), self.draws_unconditionally, device=input_ids.device)
        condition = self.image_decoder.condition(unconditional_N)
        pads_BT = input_ids == self.config.image_gen_pad_token_id
        if states is None:
            words_NLC = self.image_decoder.words(drawing.inputs_NLd.to(condition.start_N1C.dtype), slice(1, tokens))
            drawn_NLH = self.projector_in(torch.cat([condition.start_N1C, words_NLC], dim=1))
            embeds_BTH = self.embed(input_ids, pixel_values, image_grid_thw)
            embeds_BTH = embeds_BTH.masked_scatter(pads_BT[..., None], drawn_NLH.to(embeds_BTH.dtype))
            mask_BT, positions = self.layout(input_ids, attention_mask, image_grid_thw, blocks)
            states = self.language_states(embeds_BTH, mask_BT, positions)
        y_NLC = self.projector_out(states[pads_BT].view(len(first_N2), tokens, -1))
        context = self.context(states, attention_mask, first_N2)
        logits = self.image_decoder(y_NLC, condition, context, schedule, drawing.drop_path, tokens=slice(tokens))
        words = self.lm_head(states) if text_logits else None
        return VargptOutput(logits=words, image_logits=logits, image_labels=drawing.labels_NLs, states=states)

    def language_states(
        self, embeds_BTH: torch.Tensor, mask_BT: torch.Tensor | None, positions: torch.Tensor
    ) -> torch.Tensor:
        """Return the language model's states [B, T, H] of rows that it reads at once; see `layout`."""
        return self.model.language_model(
            inputs_embeds=embeds_BTH, attention_mask=mask_BT, position_ids=positions, use_cache=False
        ).last_hidden_state

    @property
    def has_language_model(self) -> bool:
        """Tell whether the model still has its language model."""
        return next(self.model.parameters(), None) is not None

    def drop_language_model(self) -> None:
        """Free language model, text head and vision tower: a pass then needs ``states``, and no text logits."""
        empty: Any = nn.Module()
        empty.language_model = nn.Module()
        self.model = empty
        self.lm_head = nn.Module()

    def enable_input_require_grads(self) -> None:
        """Do nothing. Recomputation here needs no inputs with gradients, and a frozen language model no graph."""

    def layout(self, input_ids_BT, attention_mask_BT, image_grid_thw, blocks_BT) -> tuple:
        """Return attention mask and positions for the language model.

        Rows without padding at their beginning get a mask of ones: no real token comes after a pad, and with such a
        mask transformers uses causal attention, a flash kernel on GPUs, instead of a mask [B, 1, T, T]. For packed rows
        transformers expects no mask, and positions that restart with each block. Pads are a block of their own.
        """
        positions = self.positions(input_ids_BT, attention_mask_BT, image_grid_thw)
        if blocks_BT is None:
            begins_padded = not attention_mask_BT[:, 0].all()
            return attention_mask_BT if begins_padded else torch.ones_like(attention_mask_BT), positions
        place_BT = torch.arange(blocks_BT.shape[1], device=blocks_BT.device).expand_as(blocks_BT)
        begins_BT = blocks_BT.diff(dim=1, prepend=torch.full_like(blocks_BT[:, :1], -1)) != 0
        first_BT = (place_BT * begins_BT).cummax(1).values
        positions = positions - positions.gather(-1, first_BT.expand_as(positions))
        return None, self.block_positions(place_BT - first_BT, positions)

    def find_drawings(self, input_ids_BT: torch.Tensor, images: int, tokens: int) -> torch.Tensor:
        """Return row and position of the first ``image_gen_pad`` of each drawn image, int64 [N, 2].

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
        """Embed tokens, with the features of understood images in place of ``image_pad``: [B, T, H]."""
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
    """Count positions from the first real token of each row: int64 [B, T]."""
    return (attention_mask_BT.long().cumsum(-1) - 1).clamp(min=0)
