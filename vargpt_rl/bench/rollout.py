"""Drawing with caches against the same without: ``python -m vargpt_rl.bench.rollout``.

``redraw`` is the plain baseline: for each scale one teacher-forced pass over the prompt and all scales up to it. Both
draw the same prompts of the shapes world with the same seeds, without guidance, on the embedded model, in turns; times
are the best of several, in one process. Memory is the most that torch's allocator has handed out while drawing, on top
of the weights.

Shape legend: B samples, T prompt positions, L image tokens, d bits a token, h w latent grid.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from vargpt_rl.bench.memory import peak
from vargpt_rl.data.shapes import sample_scene
from vargpt_rl.model.bits import resize, to_codes, to_map, to_tokens
from vargpt_rl.model.generate import GeneratedImages, SamplingConfig, draw_bits, generate_images
from vargpt_rl.model.hub import EMBEDDED
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.prompt import REPLY, ChatFormat
from vargpt_rl.model.scales import STRIDE, schedule_for
from vargpt_rl.model.unified import Drawing

RESOLUTIONS, BATCHES, ROUNDS = (128, 256), (1, 8, 32), 3
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
    """What ``generate_images`` gives, up to rounding, with no state kept between scales. Square images, no guidance."""
    schedule, depth = schedule_for(*size), model.config.image_tokenizer_config.bits
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    summed_Bdhw = torch.zeros(len(seeds), depth, *schedule[-1])
    inputs, bits = [torch.zeros(len(seeds), 0, depth)], []
    for k, grid in enumerate(schedule):
        inputs_BLd = torch.cat(inputs, dim=1)
        pads_BL = input_ids_BT.new_full((len(seeds), 1 + inputs_BLd.shape[1]), model.config.image_gen_pad_token_id)
        ids = torch.cat([input_ids_BT, pads_BL], dim=1)
        mask = torch.cat([attention_mask_BT, torch.ones_like(pads_BL)], dim=1)
        # The scales up to this one are those of a whole image of its grid.
        drawing = Drawing(inputs_BLd, (grid[0] * STRIDE, grid[1] * STRIDE))
        logits = model(ids, mask, drawing=drawing, text_logits=False).image_logits[:, -grid[0] * grid[1] :]
        bits.append(draw_bits(logits / sampling.tau, sampling, generators))
        summed_Bdhw = summed_Bdhw + resize(to_map(to_codes(bits[-1]), grid), schedule[-1])
        if k + 1 < len(schedule):
            inputs.append(to_tokens(resize(summed_Bdhw, schedule[k + 1])))
    return GeneratedImages(torch.cat(bits, 1), summed_Bdhw)


@dataclass(frozen=True)
class RolloutResult:
    """Seconds per batch and peak bytes, of ``generate_images`` and of ``redraw``; ``same``: share of equal bits."""

    draw_s: float
    redraw_s: float
    draw_bytes: int
    redraw_bytes: int
    same: float


def prompts(chat: ChatFormat, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 ids and mask [B, T] of drawing requests, padded on the left."""
    rng = np.random.default_rng(0)
    rows = [chat.drawing_prompt(sample_scene(rng).caption, REPLY) for _ in range(count)]
    return chat.pad(rows, "left"), chat.pad([[1] * len(row) for row in rows], "left", value=0)


def timed(function: Callable, *args) -> tuple[float, GeneratedImages]:
    began = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - began, result


def memory(function: Callable, *args) -> int:
    """Bytes of torch's allocator at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function(*args)
    return peak(profiler)


def measure(model: Vargpt, chat: ChatFormat, resolution: int, batch: int, rounds: int = ROUNDS) -> RolloutResult:
    """Draw a batch both ways, ``rounds`` times each, once more under the profiler."""
    args = (model, *prompts(chat, batch), list(range(batch)), (resolution, resolution), SAMPLING)
    used = memory(generate_images, *args), memory(redraw, *args)
    best = [float("inf")] * 2
    for _ in range(rounds):
        (fast, drawn), (slow, again) = timed(generate_images, *args), timed(redraw, *args)
        best = [min(best[0], fast), min(best[1], slow)]
    same = (drawn.labels_BLs == again.labels_BLs).float().mean().item()
    return RolloutResult(*best, *used, same)


def main() -> int:
    """Print a row a resolution and batch; the exit code."""
    model = Vargpt.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    chat = ChatFormat(str(EMBEDDED), model.config)
    table = Table(title="drawing with caches and without", title_justify="left", box=SIMPLE_HEAD)
    for column in ("px", "batch", "images/s", "without", "ratio", "same bits", "MB", "without"):
        table.add_column(column, justify="right")
    for resolution in RESOLUTIONS:
        for batch in BATCHES:
            found = measure(model, chat, resolution, batch)
            rates = (f"{batch / found.draw_s:.2f}", f"{batch / found.redraw_s:.2f}")
            rest = (f"{found.redraw_s / found.draw_s:.2f}", f"{found.same:.4f}")
            used = (f"{found.draw_bytes / 1e6:.1f}", f"{found.redraw_bytes / 1e6:.1f}")
            table.add_row(str(resolution), str(batch), *rates, *rest, *used)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
