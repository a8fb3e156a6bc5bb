"""Measure the model and its preference step: ``python -m vargpt_rl.bench.model [--tiny]``.

Seconds an image of sampling with guidance, for several batches; CPU seconds and peak memory of a DPO step on one pair.
Random weights, fp32, one thread: a language model and a decoder of 8 layers of width 512, an image tokenizer of base
width 32. Beside each time stands the speed of a matrix product of the same run, so that runs on a shared machine can be
compared.
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch

from learners.image_policy import ImagePolicy
from vargpt_rl.bench.harness import peak_memory, results_table
from vargpt_rl.bench.memory import Case, enlarged, real_loss, score
from vargpt_rl.common.console import wide_console
from vargpt_rl.common.streams import make_outputs_lasting
from vargpt_rl.memory.inputs import batch
from vargpt_rl.model.configuration import VargptConfig
from vargpt_rl.model.generate import SamplingConfig, generate_images, to_images
from vargpt_rl.model.hub import EMBEDDED
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.stages import LANGUAGE_INPUTS, STAGES, freeze

TEXT = 32
"""Text tokens per row."""
SAMPLING = SamplingConfig(cfg=3.0)
MIB = 2**20


def bench_config() -> VargptConfig:
    """Return the configuration of the benchmark's model."""
    config = enlarged(width=512, feed_forward=2048, layers=8, heads=8, key_value_heads=2, depth=8)
    tokenizer = config.image_tokenizer_config
    tokenizer.base_channels = 32
    tokenizer.channel_multipliers = (1, 2, 4, 4, 4)
    tokenizer.blocks_per_level = 2
    tokenizer.norm_groups = 32
    return config


def cpu_seconds(function: Callable, *args) -> float:
    """Call a function; return the processor time it took."""
    began = time.process_time()
    function(*args)
    return time.process_time() - began


def matrix_peak() -> float:
    """Measure the best of five matrix products: floating-point operations per second."""
    size = 1024
    a, b = torch.randn(2, size, size)
    return 2 * size**3 / min(cpu_seconds(torch.mm, a, b) for _ in range(5))


def draw(model: Vargpt, resolution: int, rows: int) -> None:
    """Sample and decode ``rows`` images."""
    inputs = batch(model, rows, rows, resolution, text=TEXT)
    prompt = slice(TEXT)
    seeds = list(range(rows))
    ids, mask = inputs["input_ids"][:, prompt], inputs["attention_mask"][:, prompt]
    drawn = generate_images(model, ids, mask, seeds, (resolution, resolution), SAMPLING)
    to_images(model, drawn.summed_Bdhw)


def step(model: ImagePolicy, resolution: int, states_BTH: torch.Tensor | None = None) -> None:
    """Compute the gradients of a DPO step on one pair."""
    model.zero_grad()
    real_loss(Case("", "dpo", 0, resolution, 1), model, model, resolution, states_BTH).backward()


def states_of(model: ImagePolicy, resolution: int) -> torch.Tensor:
    """Compute the language model's states [B, T, H] of the pair of `step`."""
    with torch.no_grad():
        states_BTH = score(model, model, batch(model, 2, 2, resolution, text=TEXT), resolution).states
    assert states_BTH is not None  # a policy returns them
    return states_BTH


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the embedded model's size, at 64 px, in seconds")
    parser.add_argument("--resolutions", type=int, nargs="+", help="pixels per side (default 256 512; 64 with --tiny)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="images sampled at once (default 1 4)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = VargptConfig.from_pretrained(EMBEDDED) if options.tiny else bench_config()
    resolutions = options.resolutions or ([64] if options.tiny else [256, 512])
    model = ImagePolicy(config)
    table = results_table(
        "the model, fp32, one thread", ("work", "px", "CPU s", "MiB", "GFLOP/s of mm"), left=("work",)
    )

    def add(work: str, resolution: int, seconds: float, mib: str) -> None:
        table.add_row(work, str(resolution), f"{seconds:.3f}", mib, f"{matrix_peak() / 1e9:.1f}")

    for resolution in resolutions:
        model.eval()
        for rows in options.batches:
            seconds = cpu_seconds(draw, model, resolution, rows) / rows
            add(f"image, guidance 3, batch {rows}", resolution, seconds, "")
        model.train()
        works: dict[str, tuple[tuple[str, ...], bool]] = {
            "DPO step": ((), False),
            f"DPO step, {LANGUAGE_INPUTS} frozen": ((LANGUAGE_INPUTS,), False),
            "DPO step, states stored": ((LANGUAGE_INPUTS,), True),
        }
        for work, (frozen, stored) in works.items():
            freeze(model, STAGES["dpo"].without(frozen))
            given = (states_of(model, resolution),) if stored else ()
            seconds = cpu_seconds(step, model, resolution, *given)
            model.zero_grad()
            add(work, resolution, seconds, f"{peak_memory(step, model, resolution, *given) / MIB:.0f}")
    wide_console().print(table)
    return 0


if __name__ == "__main__":
    make_outputs_lasting()
    sys.exit(main())
