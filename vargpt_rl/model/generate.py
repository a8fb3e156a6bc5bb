"""Image generation: next-scale sampling with key-value caches and classifier-free guidance.

The language model reads the prompt once, or continues from its cache; then each scale takes one pass of language model
and visual decoder over the tokens of that scale alone (specification, section 5). Each family defines the unconditional
branch of guidance and its strength.

Deviations from the published code: any batch size, prompts of different lengths; each sample draws its noise from its
own seed, so it does not depend on the rest of the batch; caches are kept in a separate object, not on the model, and
may contain any number of generated images.

Shape legend: B samples, T prompt positions, M rows (conditional, then unconditional with guidance), n tokens of one
scale and m twice as many, K scales, L image tokens, d bits or s symbols per token, D logits per token, V codes, h w
latent grid, C decoder width, H language-model width (H W of images: pixels).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from PIL import Image
from transformers import DynamicCache

from vargpt_rl.common.settings import Between, Count, NotNegative, Positive, check_ranges
from vargpt_rl.model.decoder import Condition, DecoderContext, ScaleCache
from vargpt_rl.model.likelihood import image_log_probs, symbol_log_probs
from vargpt_rl.model.multiscale import Symbols
from vargpt_rl.model.noise import SeededNoise
from vargpt_rl.model.scales import scale_slices, token_count
from vargpt_rl.model.unified import Unified
from vargpt_rl.model.v1.decoder import V1Condition


@dataclass
class SamplingConfig:
    """Sampling of image tokens; the defaults are those of the v1.1 release."""

    cfg: NotNegative = 3.0
    """Guidance strength. Off is 1 in v1.1, and 0 in v1, where it grows from 0 at the first scale to ``cfg``."""
    tau: Positive = 0.5
    """Temperature of the logits; ``top_k`` 1 draws the likelier bit."""
    top_k: Count = 900
    """Sample among the ``top_k`` most likely values of a symbol; 1 is greedy."""
    top_p: Annotated[float, Between(0, 1, includes_low=False)] = 0.97
    """Sample among the most likely values that together reach this probability."""

    def __post_init__(self):
        check_ranges(SamplingConfig, self, "sampling")


class GeneratedImages(NamedTuple):
    """Generated image tokens of a batch."""

    labels_BLs: torch.Tensor
    """Integers."""
    summed_Bdhw: torch.Tensor
    """Sum of the codes, which decodes to the images."""
    log_probs_BK: torch.Tensor
    """Log-probability of each scale's labels in nats, float64: of the logits divided by tau, without guidance."""


def draw_bits(logits_BnD2: torch.Tensor, sampling: SamplingConfig, noise: SeededNoise) -> torch.Tensor:
    """Sample bits uint8 [B, n, d] from logits [B, n, 2d], already divided by tau and guided.

    top_k and top_p act on two options: top_k = 1 keeps the likelier, top_p drops the weaker at 1 - top_p or below.
    """
    difference = logits_BnD2[..., 1::2].float() - logits_BnD2[..., 0::2].float()
    p = torch.sigmoid(difference)
    sure = torch.minimum(p, 1 - p) <= 1 - sampling.top_p if sampling.top_k > 1 else torch.ones_like(p, dtype=torch.bool)
    return torch.where(sure, difference > 0, noise.uniform(*p.shape[1:]) < p).to(torch.uint8)


def draw_indices(logits_BnV: torch.Tensor, sampling: SamplingConfig, noise: SeededNoise) -> torch.Tensor:
    """Sample indices int32 [B, n, 1] from logits [B, n, V], already divided by tau and guided.

    Candidates are the ``top_k`` likeliest, in order, while the probability of those before is less than ``top_p``.
    """
    likeliest = logits_BnV.float().topk(min(sampling.top_k, logits_BnV.shape[-1]), dim=-1)
    p = likeliest.values.softmax(-1, dtype=torch.float64)
    p = torch.where(p.cumsum(-1) - p < sampling.top_p, p, 0)
    reached = p.cumsum(-1)
    threshold = noise.uniform(p.shape[1], 1, dtype=torch.float64) * reached[..., -1:]
    rank = (reached <= threshold).sum(-1, keepdim=True)
    return likeliest.indices.gather(-1, rank).to(torch.int32)


def draw_labels(
    logits_BnD: torch.Tensor, symbols: Symbols, sampling: SamplingConfig, noise: SeededNoise
) -> torch.Tensor:
    """Sample bits or indices, integers [B, n, s], from logits [B, n, s * values]."""
    draw = draw_bits if symbols.values == 2 else draw_indices
    return draw(logits_BnD, sampling, noise)


class GenerationState:
    """The language model's cache and states for a batch of rows.

    The states of every token, generated ones included, are kept: they are the context of images drawn later.
    """

    def __init__(self, model: Unified, batch: int):
        self.model = model
        self.batch = batch
        self.cache = DynamicCache(config=model.config.text_config)
        self.mask_BT = torch.ones(batch, 0, dtype=torch.long, device=model.device)
        self.next_position_B = torch.zeros(batch, dtype=torch.long, device=model.device)
        self.states: list[torch.Tensor] = []

    def read(self, input_ids_BT, attention_mask_BT, pixel_values=None, image_grid_thw=None) -> None:
        """Read token ids, and the understood images among them. Rows must not end with padding."""
        positions = self.model.positions(input_ids_BT, attention_mask_BT, image_grid_thw)
        embeds_BTH = self.model.embed(input_ids_BT, pixel_values, image_grid_thw)
        self._step(embeds_BTH, attention_mask_BT, positions + self.next_position_B[:, None])

    def read_drawn(self, embeds_BnH: torch.Tensor) -> torch.Tensor:
        """Read drawn tokens and return their states [B, n, H]."""
        mask_Bn = self.mask_BT.new_ones(embeds_BnH.shape[:2])
        return self._step(embeds_BnH, mask_Bn, self.model.positions(mask_Bn, mask_Bn) + self.next_position_B[:, None])

    def read_drawn_beside(self, embeds_BnH: torch.Tensor, alone_BnH: torch.Tensor) -> torch.Tensor:
        """Read drawn tokens, and in the same pass others at positions from 0 that see only themselves: [2B, n, H].

        Each row holds both, one after the other, under a mask. The others are not remembered.
        """
        count = embeds_BnH.shape[1]
        mask_Bn = self.mask_BT.new_ones(self.batch, count)
        plain = self.model.positions(mask_Bn, mask_Bn)
        positions = plain + self.next_position_B[:, None]
        past_B1nT = self.mask_BT.bool()[:, None, None].expand(-1, 1, count, -1)
        own_B1nn = mask_Bn.new_ones(self.batch, 1, count, count, dtype=torch.bool).tril()
        hidden_B1nn, unseen_B1nT = torch.zeros_like(own_B1nn), torch.zeros_like(past_B1nT)
        drawn_B1nT = torch.cat([past_B1nT, own_B1nn, hidden_B1nn], dim=3)
        others_B1nT = torch.cat([unseen_B1nT, hidden_B1nn, own_B1nn], dim=3)
        seen_B1mT = torch.cat([drawn_B1nT, others_B1nT], dim=2)
        least = torch.finfo(embeds_BnH.dtype).min
        mask_B1mT = torch.zeros(seen_B1mT.shape, dtype=embeds_BnH.dtype, device=embeds_BnH.device)
        states_BmH = self._pass(
            torch.cat([embeds_BnH, alone_BnH], dim=1),
            mask_B1mT.masked_fill(~seen_B1mT, least),  # added to scores: every attention of transformers takes that
            torch.cat([positions, plain], dim=-1),
        )
        self.cache.crop(-count)
        states_BnH, others_BnH = states_BmH.chunk(2, dim=1)
        self._remember(states_BnH, mask_Bn, positions)
        return torch.cat([states_BnH, others_BnH])

    def _step(self, embeds_BnH, mask_Bn, positions) -> torch.Tensor:
        states = self._pass(embeds_BnH, torch.cat([self.mask_BT, mask_Bn], dim=1), positions)
        self._remember(states, mask_Bn, positions)
        return states

    def _pass(self, embeds_BnH, mask, positions) -> torch.Tensor:
        return self.model.model.language_model(
            inputs_embeds=embeds_BnH,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state

    def _remember(self, states_BnH, mask_Bn, positions) -> None:
        self.mask_BT = torch.cat([self.mask_BT, mask_Bn], dim=1)
        self.next_position_B = positions[..., -1].view(-1, self.batch).amax(0) + 1  # the largest over m-rope's axes
        self.states.append(states_BnH)

    def context(self) -> DecoderContext | None:
        """Return what the decoder sees of the prompt for an image that begins here, after ``image_gen_start``."""
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
    given_BLs: torch.Tensor | None = None,
    draw: "DrawsScales | None" = None,
) -> GeneratedImages:
    """Generate one image of ``size`` (height, width) pixels for each prompt.

    ``given_BLs`` are the labels of the first scales, which are then not drawn: images are completed from there.
    ``draw`` takes the place of `draw_scales`, as `vargpt_rl.model.graphs.DrawingGraphs` does.

    Prompts are int64 [B, T], left-padded, and end with ``image_gen_start``; raises ValueError otherwise, or if there is
    not one seed per sample.
    """
    if len(seeds) != len(input_ids_BT):
        raise ValueError(f"expected one seed per prompt, got {len(seeds)} seeds for {len(input_ids_BT)} prompts")
    if (input_ids_BT[:, -1] != model.config.image_gen_start_token_id).any():
        raise ValueError("each prompt must end with image_gen_start; pad on the left")
    model.image_tokenizer.schedule_for(*size)  # reject a bad size before reading the prompts
    reading = GenerationState(model, len(seeds))
    reading.read(input_ids_BT, attention_mask_BT, pixel_values, image_grid_thw)
    start = start_drawing(reading, sampling)
    return (draw or draw_scales)(reading, start, SeededNoise(seeds, model.device), size, sampling, given_BLs)


@torch.inference_mode()
def draw_next(
    reading: GenerationState, seeds: list[int], size: tuple[int, int], sampling: SamplingConfig
) -> GeneratedImages:
    """Draw one image per row after ``image_gen_start``, which was read last. Its L tokens are read in the process."""
    return draw_scales(
        reading, start_drawing(reading, sampling), SeededNoise(seeds, reading.model.device), size, sampling
    )


class DrawingStart(NamedTuple):
    """Inputs of the decoder beside the image: condition, and context if the family has one. M rows each."""

    condition: Condition | V1Condition
    context: DecoderContext | None


def start_drawing(reading: GenerationState, sampling: SamplingConfig) -> DrawingStart:
    """Compute condition and context of images that begin here; with guidance, of the unconditional branch too."""
    model = reading.model
    rows = reading.batch * (1 + model.guided(sampling.cfg))
    unconditional_M = torch.arange(rows, device=model.device) >= reading.batch
    return DrawingStart(*model.start_drawing(reading.context(), unconditional_M | model.draws_unconditionally))


def draw_scales(
    reading: GenerationState,
    start: DrawingStart,
    noise: SeededNoise,
    size: tuple[int, int],
    sampling: SamplingConfig,
    given_BLs: torch.Tensor | None = None,
) -> GeneratedImages:
    """Draw one image per row, scale by scale: a pass of language model and decoder over the tokens of each.

    Nothing here waits for the device.
    """
    model = reading.model
    tokenizer = model.image_tokenizer
    decoder = model.image_decoder
    schedule = tokenizer.schedule_for(*size)
    symbols = model.config.image_tokenizer_config.symbols
    slices = scale_slices(schedule)
    batch = reading.batch
    guided = model.guided(sampling.cfg)
    condition, context = start
    decoder_cache = ScaleCache(model.config.decoder_config.depth, token_count(schedule))
    words_MnC = condition.start_N1C
    labels: list[torch.Tensor] = []
    log_probs: list[torch.Tensor] = []
    summed = None
    for k, at in enumerate(slices):
        y_MnC = model.projector_out(model.drawing_states(reading, model.projector_in(words_MnC), noise))
        logits = decoder(y_MnC, condition, context, schedule, cache=decoder_cache, tokens=at) / sampling.tau
        unguided_BnD = logits[:batch]
        if guided:
            logits = model.guide(logits, sampling.cfg, k / max(len(schedule) - 1, 1))
        if given_BLs is not None and at.stop <= given_BLs.shape[1]:
            labels.append(given_BLs[:, at])
        else:
            labels.append(draw_labels(logits, symbols, sampling, noise))
        log_probs.append(image_log_probs(symbol_log_probs(unguided_BnD, labels[-1])))
        added = tokenizer.addend(labels[-1], schedule, k, words_MnC.dtype)
        summed = added if summed is None else summed + added
        if k + 1 < len(schedule):
            inputs_BnD = tokenizer.inputs(summed, schedule[k + 1])
            words_MnC = decoder.words(inputs_BnD, slices[k + 1]).repeat(1 + guided, 1, 1)
    assert summed is not None  # a schedule has at least one scale
    return GeneratedImages(torch.cat(labels, 1), summed, torch.stack(log_probs, 1))


DrawsScales = Callable[..., GeneratedImages]
"""A function with the arguments of `draw_scales`."""


@torch.inference_mode()
def to_uint8(images_B3HW: torch.Tensor) -> torch.Tensor:
    """Convert images in [-1, 1] to uint8 [B, H, W, 3]."""
    return ((images_B3HW.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


@torch.inference_mode()
def to_images(model: Unified, summed_Bdhw: torch.Tensor) -> list[Image.Image]:
    """Decode latent sums to images."""
    return [Image.fromarray(image) for image in to_uint8(model.image_tokenizer.decode(summed_Bdhw)).cpu().numpy()]
