"""Drawing images: next-scale sampling with key-value caches and classifier-free guidance.

The language model reads the prompt once, or goes on from what it has read; then each scale takes one pass of language
model and visual decoder over the tokens of that scale alone (specification, section 5). What the unconditional branch
of guidance is, and how strong, is each family's own affair.

Deviations from the published code: any batch size, prompts of different lengths; each sample draws its noise from its
own seed, so it does not depend on its neighbours; what is read is kept in an object of its own, not on the model, and
may hold any number of drawn images.

Shape legend: B samples, T prompt positions, M rows (conditional, then unconditional with guidance), n tokens of one
scale, L image tokens, d bits or s symbols a token, D logits a token, C decoder width, H language-model width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from transformers import DynamicCache

from vargpt_rl.model.decoder import DecoderContext, ScaleCache
from vargpt_rl.model.multiscale import Symbols
from vargpt_rl.model.scales import scale_slices
from vargpt_rl.model.unified import Unified


@dataclass
class SamplingConfig:
    """How image tokens are drawn. Defaults are those of the release of v1.1.

    ``cfg``: in v1.1 1 is without guidance; in v1 0 is, and the strength grows from 0 at the first scale to ``cfg``.
    """

    cfg: float = 3.0
    tau: float = 0.5
    top_k: int = 900
    top_p: float = 0.97

    def __post_init__(self):
        if self.tau <= 0:
            raise ValueError(f"sampling.tau={self.tau}: expected a number above 0 (top_k=1 draws the likelier bit)")
        if self.top_k < 1:
            raise ValueError(f"sampling.top_k={self.top_k}: expected 1 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p={self.top_p}: expected a number in (0, 1]")


class GeneratedImages(NamedTuple):
    """``labels_BLs`` integers; ``summed_Bdhw`` the latent sum that decodes to the images."""

    labels_BLs: torch.Tensor
    summed_Bdhw: torch.Tensor

    @property
    def bits_BLd(self) -> torch.Tensor:
        """The labels where they are bits: uint8 [B, L, d]."""
        return self.labels_BLs


def draw_bits(logits_BnD2: torch.Tensor, sampling: SamplingConfig, generators: list[torch.Generator]) -> torch.Tensor:
    """uint8 [B, n, d] from logits [B, n, 2d], already divided by tau and guided.

    top_k and top_p act on two options: top_k = 1 keeps the likelier, top_p drops the weaker at 1 - top_p or below.
    """
    difference = logits_BnD2[..., 1::2].float() - logits_BnD2[..., 0::2].float()
    p = torch.sigmoid(difference)
    noise = torch.stack([torch.rand(p.shape[1:], generator=g) for g in generators]).to(p.device)
    sure = torch.minimum(p, 1 - p) <= 1 - sampling.top_p if sampling.top_k > 1 else torch.ones_like(p, dtype=torch.bool)
    return torch.where(sure, difference > 0, noise < p).to(torch.uint8)


def draw_indices(logits_BnV: torch.Tensor, sampling: SamplingConfig, generators: list[torch.Generator]) -> torch.Tensor:
    """int32 [B, n, 1] from logits [B, n, V], already divided by tau and guided.

    Of the ``top_k`` likeliest, in order, those are kept before which less than ``top_p`` has been reached.
    """
    likeliest = logits_BnV.float().topk(min(sampling.top_k, logits_BnV.shape[-1]), dim=-1)
    p = likeliest.values.softmax(-1, dtype=torch.float64)
    p = torch.where(p.cumsum(-1) - p < sampling.top_p, p, 0)
    reached = p.cumsum(-1)
    noise = torch.stack([torch.rand(p.shape[1], 1, generator=g, dtype=torch.float64) for g in generators])
    rank = (reached <= noise.to(p.device) * reached[..., -1:]).sum(-1, keepdim=True)
    return likeliest.indices.gather(-1, rank).to(torch.int32)


def draw_labels(logits_BnD: torch.Tensor, symbols: Symbols, *how) -> torch.Tensor:
    """Integers [B, n, s] from logits [B, n, s * values]: bits or indices."""
    return draw_bits(logits_BnD, *how) if symbols.values == 2 else draw_indices(logits_BnD, *how)


class GenerationState:
    """What the language model has read of a batch of rows so far: its cache and its states.

    The states of all that was read are kept, drawn tokens included: they are the context of images drawn later.
    """

    def __init__(self, model: Unified, batch: int):
        self.model, self.batch = model, batch
        self.cache = DynamicCache(config=model.config.text_config)
        self.mask_BT = torch.ones(batch, 0, dtype=torch.long, device=model.device)
        self.next_position_B = torch.zeros(batch, dtype=torch.long, device=model.device)
        self.states: list[torch.Tensor] = []

    def read(self, input_ids_BT, attention_mask_BT, pixel_values=None, image_grid_thw=None) -> None:
        """Read token ids and the understood images among them; every row ends with a token, not with padding."""
        positions = self.model.positions(input_ids_BT, attention_mask_BT, image_grid_thw)
        embeds_BTH = self.model.embed(input_ids_BT, pixel_values, image_grid_thw)
        self._step(embeds_BTH, attention_mask_BT, positions + self.next_position_B[:, None])

    def read_drawn(self, embeds_BnH: torch.Tensor) -> torch.Tensor:
        """Read drawn tokens; their states [B, n, H]."""
        mask_Bn = self.mask_BT.new_ones(embeds_BnH.shape[:2])
        return self._step(embeds_BnH, mask_Bn, self.model.positions(mask_Bn, mask_Bn) + self.next_position_B[:, None])

    def _step(self, embeds_BnH, mask_Bn, positions) -> torch.Tensor:
        self.mask_BT = torch.cat([self.mask_BT, mask_Bn], dim=1)
        states = self.model.model.language_model(
            inputs_embeds=embeds_BnH,
            attention_mask=self.mask_BT,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        self.next_position_B = positions[..., -1].view(-1, self.batch).amax(0) + 1  # of any axis
        self.states.append(states)
        return states

    def context(self) -> DecoderContext:
        """The decoder's context of an image that begins here, when ``image_gen_start`` was read last."""
        rows = torch.arange(len(self.mask_BT), device=self.mask_BT.device)
        first_N2 = torch.stack([rows, torch.full_like(rows, self.mask_BT.shape[1])], dim=1)
        return self.model.context(torch.cat(self.states, dim=1), self.mask_BT, first_N2)


@torch.inference_mode()
def generate_images(
    model: Unified,
    input_ids_BT: torch.Tensor,
    attention_mask_BT: torch.Tensor,
    seeds: list[int],
    size: tuple[int, int],
    sampling: SamplingConfig,
    pixel_values: torch.Tensor | None = None,
    image_grid_thw: torch.Tensor | None = None,
) -> GeneratedImages:
    """Draw one image of ``size`` (height, width) pixels for each prompt.

    int64 [B, T] left-padded prompts whose last token is ``image_gen_start``; one seed a sample. Raises ValueError when
    the prompts do not end so or the seeds are not one a sample.
    """
    if len(seeds) != len(input_ids_BT):
        raise ValueError(f"{len(seeds)} seeds for {len(input_ids_BT)} prompts, expected one each")
    if (input_ids_BT[:, -1] != model.config.image_gen_start_token_id).any():
        raise ValueError("each prompt must end with image_gen_start; pad on the left")
    model.image_tokenizer.schedule_for(*size)  # refuses a bad size before the prompts are read
    reading = GenerationState(model, len(seeds))
    reading.read(input_ids_BT, attention_mask_BT, pixel_values, image_grid_thw)
    return draw_next(reading, seeds, size, sampling)


@torch.inference_mode()
def draw_next(
    reading: GenerationState, seeds: list[int], size: tuple[int, int], sampling: SamplingConfig
) -> GeneratedImages:
    """Draw one image a row after what was read, ``image_gen_start`` last; its L tokens are then read as well."""
    model, tokenizer, decoder = reading.model, reading.model.image_tokenizer, reading.model.image_decoder
    schedule, symbols = tokenizer.schedule_for(*size), model.config.image_tokenizer_config.symbols
    slices, batch, guided = scale_slices(schedule), len(seeds), model.guided(sampling.cfg)
    unconditional_M = torch.arange(batch * (1 + guided), device=model.device) >= batch
    condition, context = model.start_drawing(reading.context(), unconditional_M | model.draws_unconditionally)

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    decoder_cache = ScaleCache(model.config.decoder_config.depth)
    words_MnC, labels, summed = condition.start_N1C, [], None
    for k, at in enumerate(slices):
        y_MnC = model.projector_out(model.drawing_states(reading, model.projector_in(words_MnC), generators))
        logits = decoder(y_MnC, condition, context, schedule, cache=decoder_cache, tokens=at) / sampling.tau
        if guided:
            logits = model.guide(logits, sampling.cfg, k / max(len(schedule) - 1, 1))
        labels.append(draw_labels(logits, symbols, sampling, generators))
        added = tokenizer.addend(labels[-1], schedule, k, words_MnC.dtype)
        summed = added if summed is None else summed + added
        if k + 1 < len(schedule):
            inputs_BnD = tokenizer.inputs(summed, schedule[k + 1])
            words_MnC = decoder.words(inputs_BnD, slices[k + 1]).repeat(1 + guided, 1, 1)
    return GeneratedImages(torch.cat(labels, 1), summed)


@torch.inference_mode()
def to_uint8(images_B3HW: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] -> uint8 [B, H, W, 3]."""
    return ((images_B3HW.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


@torch.inference_mode()
def to_images(model: Unified, summed_Bdhw: torch.Tensor) -> list[Image.Image]:
    """The images that latent sums decode to, one by one, so that no pixel is rounded otherwise in another batch."""
    decoded = (model.image_tokenizer.decode(summed_1dhw) for summed_1dhw in summed_Bdhw.split(1))
    return [Image.fromarray(to_uint8(image_13HW)[0].cpu().numpy()) for image_13HW in decoded]
