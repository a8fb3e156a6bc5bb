"""Compare sampling with and without caches: ``python -m vargpt_rl.bench.rollout``.

``redraw`` is the baseline: one teacher-forced pass per scale, over the prompt and all scales so far. Both take turns to
sample the same prompts of the shapes world with the same seeds, without guidance, on the embedded model; times are the
best of several, in one process. Memory is the peak of torch's allocator while sampling, on top of the weights.

Shape legend: B samples, T prompt positions, L image tokens, d bits or s symbols per token, h w latent grid.
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch

from vargpt_rl.bench.harness import peak_memory, results_table, timed
from vargpt_rl.common.console import print_table
from vargpt_rl.common.streams import make_outputs_lasting
from vargpt_rl.common.usage import print_usage_if_asked
from vargpt_rl.data.shapes import sample_scene
from vargpt_rl.model.bits import resize, to_codes, to_map, to_tokens
from vargpt_rl.model.generate import GeneratedImages, SamplingConfig, draw_bits, generate_images
from vargpt_rl.model.hub import EMBEDDED
from vargpt_rl.model.likelihood import bit_log_probs, image_log_probs
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.noise import SeededNoise
from vargpt_rl.model.prompt import REPLY, ChatFormat
from vargpt_rl.model.scales import STRIDE, schedule_for
from vargpt_rl.model.unified import Drawing

RESOLUTIONS = (128, 256)
BATCHES = (1, 8, 32)
ROUNDS = 3
SAMPLING = SamplingConfig(cfg=1.0)


@torch.inference_mode()
def redraw(
    model: Vargpt,
    input_ids_BT: torch.Tensor,
    attention_mask_BT: torch.Tensor,
    seeds: list[int],
    size: tuple[int, int],
    sampling: SamplingConfig,
) -> GeneratedImages:
    """Generate as ``generate_images`` does, up to rounding, but without caches. Square images, no guidance."""
    schedule = schedule_for(*size)
    depth = model.config.image_tokenizer_config.bits
    noise = SeededNoise(seeds)
    summed_Bdhw = torch.zeros(len(seeds), depth, *schedule[-1])
    inputs = [torch.zeros(len(seeds), 0, depth)]
    bits = []
    log_probs = []
    for k, grid in enumerate(schedule):
        inputs_BLd = torch.cat(inputs, dim=1)
        pads_BL = input_ids_BT.new_full((len(seeds), 1 + inputs_BLd.shape[1]), model.config.image_gen_pad_token_id)
        ids = torch.cat([input_ids_BT, pads_BL], dim=1)
        mask = torch.cat([attention_mask_BT, torch.ones_like(pads_BL)], dim=1)
        # The scales so far are those of a whole image of this grid.
        drawing = Drawing(inputs_BLd, (grid[0] * STRIDE, grid[1] * STRIDE))
        logits = model(ids, mask, drawing=drawing, text_logits=False).image_logits[:, -grid[0] * grid[1] :]
        bits.append(draw_bits(logits / sampling.tau, sampling, noise))
        log_probs.append(image_log_probs(bit_log_probs(logits / sampling.tau, bits[-1])))
        summed_Bdhw = summed_Bdhw + resize(to_map(to_codes(bits[-1]), grid), schedule[-1])
        if k + 1 < len(schedule):
            inputs.append(to_tokens(resize(summed_Bdhw, schedule[k + 1])))
    return GeneratedImages(torch.cat(bits, 1), summed_Bdhw, torch.stack(log_probs, 1))


@dataclass(frozen=True)
class RolloutResult:
    """Seconds per batch and peak bytes, of ``generate_images`` and of ``redraw``."""

    draw_s: float
    redraw_s: float
    draw_bytes: int
    redraw_bytes: int
    same: float
    """Share of equal bits."""


def prompts(chat: ChatFormat, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Build int64 ids and mask [B, T] of image prompts, padded on the left."""
    rng = np.random.default_rng(0)
    rows = [chat.drawing_prompt(sample_scene(rng).caption, REPLY) for _ in range(count)]
    return chat.pad(rows, "left"), chat.pad([[1] * len(row) for row in rows], "left", value=0)


def measure(model: Vargpt, chat: ChatFormat, resolution: int, batch: int, rounds: int = ROUNDS) -> RolloutResult:
    """Sample a batch both ways, ``rounds`` times each and once more under the profiler."""
    args = (model, *prompts(chat, batch), list(range(batch)), (resolution, resolution), SAMPLING)
    draw_bytes = peak_memory(generate_images, *args)
    redraw_bytes = peak_memory(redraw, *args)
    draw_s = float("inf")
    redraw_s = float("inf")
    for _ in range(rounds):
        seconds, images = timed(generate_images, *args)
        draw_s = min(draw_s, seconds)
        seconds, baseline = timed(redraw, *args)
        redraw_s = min(redraw_s, seconds)
    same = (images.labels_BLs == baseline.labels_BLs).float().mean().item()
    return RolloutResult(draw_s, redraw_s, draw_bytes, redraw_bytes, same)


def main() -> int:
    """Print a row per resolution and batch; return the exit code."""
    print_usage_if_asked(f"usage: {__doc__}")
    model = Vargpt.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    chat = ChatFormat(str(EMBEDDED), model.config)
    columns = ("px", "batch", "images/s", "without", "ratio", "same bits", "MB", "without")
    table = results_table("sampling with caches and without", columns)
    for resolution in RESOLUTIONS:
        for batch in BATCHES:
            found = measure(model, chat, resolution, batch)
            table.add_row(
                str(resolution),
                str(batch),
                f"{batch / found.draw_s:.2f}",
                f"{batch / found.redraw_s:.2f}",
                f"{found.redraw_s / found.draw_s:.2f}",
                f"{found.same:.4f}",
                f"{found.draw_bytes / 1e6:.1f}",
                f"{found.redraw_bytes / 1e6:.1f}",
            )
    print_table(table)
    return 0


if __name__ == "__main__":
    make_outputs_lasting()
    sys.exit(main())
