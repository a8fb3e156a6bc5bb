"""Memory of a rollout worker, counted by running sampling, decoding, encoding and scoring on the meta device."""

from dataclasses import dataclass

import torch

from vargpt_rl.memory.inputs import batch, log_probs
from vargpt_rl.memory.tracker import META, MetaModel, counting
from vargpt_rl.memory.units import RUNTIME, breakdown
from vargpt_rl.model.generate import GenerationState, SamplingConfig, draw_scales, start_drawing
from vargpt_rl.model.noise import SeededNoise


@dataclass(frozen=True)
class RolloutMemory:
    """Bytes of a rollout worker at one resolution."""

    resolution: int
    batch: int
    weights: int
    caches: int
    """Key-value caches at the last scale of an image."""
    activations: int

    @property
    def total(self) -> int:
        return RUNTIME + self.weights + self.caches + self.activations

    def __str__(self) -> str:
        return breakdown(self, ["weights", "caches", "activations"])


def rollout(
    meta: MetaModel,
    weights: int,
    resolution: int,
    rows: int,
    sampling: SamplingConfig,
    shown_side: int = 0,
    keeps_graphs: bool = False,
) -> RolloutMemory:
    """Count a worker's peak: sampling, encoding or scoring ``rows`` images at once, or decoding one.

    ``shown_side`` is the side of the images in prompts, if any. With ``keeps_graphs`` a recorded batch keeps the memory
    of sampling (`vargpt_rl.model.graphs`), and the rest comes on top.
    """
    model = meta.model.eval()
    size = (resolution, resolution)
    tokenizer = model.config.image_tokenizer_config
    caches = 0

    def after_scale(*_):
        nonlocal caches
        caches = tracker.live

    def sampling_images():
        inputs = batch(model, rows, rows, resolution, shown_side, edits=shown_side > 0)
        prompt = int((inputs["input_ids"][0] == model.config.image_gen_pad_token_id).int().argmax())
        ids = inputs["input_ids"][:, :prompt]
        mask = inputs["attention_mask"][:, :prompt].clone()
        mask[:, 0] = 0
        hook = model.image_decoder.register_forward_hook(after_scale)
        state = GenerationState(model, rows)
        state.read(ids, mask, inputs.get("pixel_values"), inputs.get("image_grid_thw"))
        # The tracker cannot see inference mode, in which `draw_next` is.
        draw_scales(state, start_drawing(state, sampling), SeededNoise(list(range(rows)), META), size, sampling)
        hook.remove()

    def decoding():
        grid = tokenizer.schedule_for(resolution)[-1]
        model.image_tokenizer.decode(torch.zeros(1, tokenizer.latent_channels, *grid, device=META, dtype=model.dtype))

    def encoding():
        images = torch.zeros(rows, 3, *size, device=META, dtype=model.dtype)
        model.image_tokenizer.encode(images)

    def scoring():
        log_probs(model, batch(model, rows, rows, resolution), resolution)

    peaks = []
    for job in (sampling_images, decoding, encoding, scoring):
        with torch.no_grad(), counting(meta) as tracker:
            job()
        peaks.append(tracker.peak)
    sampled, *others = peaks
    peak = sampled + max(others) if keeps_graphs else max(peaks)
    return RolloutMemory(resolution, rows, weights, caches, peak - caches)
