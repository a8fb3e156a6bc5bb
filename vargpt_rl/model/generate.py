"""Drawing pictures: next-scale sampling with key-value caches and classifier-free guidance.

The language model reads the prompt once, or goes on from what it has read; then each scale takes one pass of language
model and visual decoder over the tokens of that scale alone (specification, section 5). With guidance, the
unconditional branch is the one the released weights were sampled with: its language model sees only the tokens of the
current scale, at positions from 0, while its visual decoder does remember earlier scales; its context is the learned
unconditional rows.

Deviations from the published code: any batch size, prompts of different lengths; each sample draws its noise from its
own seed, so it does not depend on its neighbours; a prompt longer than the unconditional rows uses all of those rows
where the published code crashes; what is read is kept in an object of its own, not on the model, and may hold any
number of drawn pictures.

Shape legend: B samples, T prompt positions, M rows (conditional, then unconditional with guidance), n tokens of one
scale, L image tokens, d bits a token, C decoder width, H language-model width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import DynamicCache

from vargpt_rl.model.bits import resize, to_codes, to_map, to_tokens
from vargpt_rl.model.decoder import DecoderContext, ScaleCache
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.scales import scale_slices, schedule_for


@dataclass
class SamplingConfig:
    """How bits are drawn. Defaults are the release's."""

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


class Drawn(NamedTuple):
    """``bits_BLd`` uint8; ``summed_Bdhw`` the latent sum that decodes to the pictures."""

    bits_BLd: torch.Tensor
    summed_Bdhw: torch.Tensor


def draw_bits(logits_BnD2: torch.Tensor, sampling: SamplingConfig, generators: list[torch.Generator]) -> torch.Tensor:
    """uint8 [B, n, d] from logits [B, n, 2d], already divided by tau and guided.

    top_k and top_p act on two options: top_k = 1 keeps the likelier, top_p drops the weaker at 1 - top_p or below.
    """
    difference = logits_BnD2[..., 1::2].float() - logits_BnD2[..., 0::2].float()
    p = torch.sigmoid(difference)
    noise = torch.stack([torch.rand(p.shape[1:], generator=g) for g in generators]).to(p.device)
    sure = torch.minimum(p, 1 - p) <= 1 - sampling.top_p if sampling.top_k > 1 else torch.ones_like(p, dtype=torch.bool)
    return torch.where(sure, difference > 0, noise < p).to(torch.uint8)


class Reading:
    """What the language model has read of a batch of rows so far: its cache and its states.

    The states of all that was read are kept, drawn tokens included: they are the context of pictures drawn later.
    """

    def __init__(self, model: Vargpt, batch: int):
        self.model = model
        self.cache = DynamicCache(config=model.config.text_config)
        self.mask_BT = torch.ones(batch, 0, dtype=torch.long, device=model.device)
        self.next_position_B = torch.zeros(batch, dtype=torch.long, device=model.device)
        self.states: list[torch.Tensor] = []

    def read(self, input_ids_BT, attention_mask_BT, pixel_values=None, image_grid_thw=None) -> None:
        """Read token ids and the understood pictures among them; every row ends with a token, not with padding."""
        positions = self.model.positions(input_ids_BT, attention_mask_BT, image_grid_thw)
        embeds_BTH = self.model.embed(input_ids_BT, pixel_values, image_grid_thw)
        self._step(embeds_BTH, attention_mask_BT, positions + self.next_position_B[:, None])

    def read_drawn(self, embeds_BnH: torch.Tensor) -> torch.Tensor:
        """Read drawn tokens; their states [B, n, H]."""
        batch, n = embeds_BnH.shape[:2]
        positions_Bn = self.next_position_B[:, None] + torch.arange(n, device=embeds_BnH.device)
        return self._step(embeds_BnH, self.mask_BT.new_ones(batch, n), positions_Bn.expand(3, -1, -1))

    def _step(self, embeds_BnH, mask_Bn, positions) -> torch.Tensor:
        self.mask_BT = torch.cat([self.mask_BT, mask_Bn], dim=1)
        states = self.model.model.language_model(
            inputs_embeds=embeds_BnH,
            attention_mask=self.mask_BT,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        self.next_position_B = positions[:, :, -1].amax(0) + 1
        self.states.append(states)
        return states

    def context(self) -> DecoderContext:
        """The decoder's context of a picture that begins here, when ``image_gen_start`` was read last."""
        rows = torch.arange(len(self.mask_BT), device=self.mask_BT.device)
        first_N2 = torch.stack([rows, torch.full_like(rows, self.mask_BT.shape[1])], dim=1)
        return self.model.context(torch.cat(self.states, dim=1), self.mask_BT, first_N2)


def _with_unconditional(model: Vargpt, context: DecoderContext) -> DecoderContext:
    """Append, for each sample, as many raw unconditional rows as its prompt has states (at most all of them)."""
    rows_UC = model.image_decoder.condition.unconditional
    width = context.states_NTC.shape[1]
    lengths_B = context.mask_NT.sum(1).clamp(max=len(rows_UC))
    states_TC = F.pad(rows_UC[:width], (0, 0, 0, max(0, width - len(rows_UC))))
    states_BTC = states_TC.to(context.states_NTC.dtype).expand(len(lengths_B), -1, -1)
    mask_BT = torch.arange(width, device=lengths_B.device) < lengths_B[:, None]
    return DecoderContext(torch.cat([context.states_NTC, states_BTC]), torch.cat([context.mask_NT, mask_BT]))


@torch.inference_mode()
def draw(
    model: Vargpt,
    input_ids_BT: torch.Tensor,
    attention_mask_BT: torch.Tensor,
    seeds: list[int],
    size: tuple[int, int],
    sampling: SamplingConfig,
    pixel_values: torch.Tensor | None = None,
    image_grid_thw: torch.Tensor | None = None,
) -> Drawn:
    """Draw one picture of ``size`` (height, width) pixels for each prompt.

    int64 [B, T] left-padded prompts whose last token is ``image_gen_start``; one seed a sample. Raises ValueError when
    the prompts do not end so or the seeds are not one a sample.
    """
    if len(seeds) != len(input_ids_BT):
        raise ValueError(f"{len(seeds)} seeds for {len(input_ids_BT)} prompts, expected one each")
    if (input_ids_BT[:, -1] != model.config.image_gen_start_token_id).any():
        raise ValueError("each prompt must end with image_gen_start; pad on the left")
    schedule_for(*size)  # refuses a bad size before the prompts are read
    reading = Reading(model, len(seeds))
    reading.read(input_ids_BT, attention_mask_BT, pixel_values, image_grid_thw)
    return draw_next(reading, seeds, size, sampling)


@torch.inference_mode()
def draw_next(reading: Reading, seeds: list[int], size: tuple[int, int], sampling: SamplingConfig) -> Drawn:
    """Draw one picture a row after what was read, ``image_gen_start`` last; its L tokens are then read as well."""
    model, schedule = reading.model, schedule_for(*size)
    batch, guided = len(seeds), sampling.cfg != 1
    context = reading.context()
    dropped_M = torch.arange(batch * (1 + guided), device=model.device) >= batch
    condition = model.image_decoder.condition(dropped_M)
    if guided:
        context = _with_unconditional(model, context)

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    decoder_cache = ScaleCache(model.config.decoder_config.depth)
    words_MnC, bits, summed = condition.start_N1C, [], None
    for k, at in enumerate(scale_slices(schedule)):
        y_MnC = model.projector_out(_language_states(reading, model.projector_in(words_MnC)))
        logits = model.image_decoder(y_MnC, condition, context, schedule, cache=decoder_cache, tokens=at)
        logits = logits / sampling.tau
        if guided:
            logits = sampling.cfg * logits[:batch] + (1 - sampling.cfg) * logits[batch:]
        bits.append(draw_bits(logits, sampling, generators))
        codes = resize(to_map(to_codes(bits[-1], words_MnC.dtype), schedule[k]), schedule[-1])
        summed = codes if summed is None else summed + codes
        if k + 1 < len(schedule):
            inputs_BnD = to_tokens(resize(summed, schedule[k + 1]))
            words_MnC = model.image_decoder.word_embedding(inputs_BnD).repeat(1 + guided, 1, 1)
    return Drawn(torch.cat(bits, 1), summed)


def _language_states(reading: Reading, embeds_MnH: torch.Tensor) -> torch.Tensor:
    """One scale through the language model: after what was read for the samples, without it for the unconditional."""
    batch = len(reading.mask_BT)
    states = reading.read_drawn(embeds_MnH[:batch])
    if len(embeds_MnH) == batch:
        return states
    steps = torch.arange(embeds_MnH.shape[1], device=embeds_MnH.device)
    alone = reading.model.model.language_model(
        inputs_embeds=embeds_MnH[batch:],
        position_ids=steps.expand(3, batch, -1),
        use_cache=False,
    ).last_hidden_state
    return torch.cat([states, alone])


@torch.inference_mode()
def to_uint8(images_B3HW: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1] -> uint8 [B, H, W, 3]."""
    return ((images_B3HW.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


@torch.inference_mode()
def to_pictures(model: Vargpt, summed_Bdhw: torch.Tensor) -> list[Image.Image]:
    """The pictures that latent sums decode to, one by one, so that no pixel is rounded otherwise in another batch."""
    decoded = (model.image_tokenizer.decode(summed_1dhw) for summed_1dhw in summed_Bdhw.split(1))
    return [Image.fromarray(to_uint8(image_13HW)[0].cpu().numpy()) for image_13HW in decoded]
