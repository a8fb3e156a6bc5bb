"""Measure the model and its preference step: ``python -m vargpt_rl.bench.model [--tiny]``.

Seconds and CPU seconds an image of sampling with guidance, for several batches, and of a DPO step on one pair, with the
step's peak memory beside the weights. ``DPO step`` is its gradients; ``DPO step, AdamW`` also has the update, and
AdamW's state in its memory. Random weights, fp32, one thread: a language model and a decoder of 8 layers of width 512,
an image tokenizer of base width 32.

Beside each row stands the speed of a matrix product, measured right after it (GFLOP/s by CPU time), and the share of it
that the row reached, so that runs on a shared machine can be compared. Operations are counted by `learners.flops`:
without the image tokenizer, norms and the update.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from learners.flops import drawing_flops, shape_of, step_flops
from learners.image_policy import ImagePolicy
from vargpt_rl.bench.harness import peak_memory, results_table
from vargpt_rl.bench.memory import Case, enlarged, real_loss, score
from vargpt_rl.common.console import print_table
from vargpt_rl.common.streams import make_outputs_lasting
from vargpt_rl.memory.inputs import batch
from vargpt_rl.model.configuration import VargptConfig
from vargpt_rl.model.generate import SamplingConfig, generate_images, to_images
from vargpt_rl.model.hub import EMBEDDED
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.scales import schedule_for
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


@dataclass
class ModelRow:
    """A measurement."""

    work: str
    resolution: int
    seconds: float
    cpu: float
    """CPU seconds."""
    memory: int | None = None
    """Peak bytes beside the weights."""
    flops: int | None = None


def measured(function: Callable, *args) -> tuple[float, float]:
    """Call a function; return seconds and CPU seconds."""
    began = time.perf_counter()
    spent = time.process_time()
    function(*args)
    return time.perf_counter() - began, time.process_time() - spent


def matrix_peak() -> float:
    """Measure the best of five matrix products: floating-point operations per CPU second."""
    size = 1024
    a, b = torch.randn(2, size, size)
    return 2 * size**3 / min(measured(torch.mm, a, b)[1] for _ in range(5))


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


def prepared_adamw(model: ImagePolicy) -> torch.optim.AdamW:
    """Create AdamW for what trains, with its state as after a first step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    model.zero_grad()
    return optimizer


def update(model: ImagePolicy, resolution: int, optimizer: torch.optim.Optimizer) -> None:
    """Take a whole DPO step on one pair."""
    step(model, resolution)
    optimizer.step()


def sampling_rows(model: ImagePolicy, resolution: int, batches: list[int]) -> Iterator[ModelRow]:
    """Measure sampling, an image in each batch size."""
    model.eval()
    for rows in batches:
        seconds, cpu = measured(draw, model, resolution, rows)
        flops = drawing_flops(model, rows, TEXT, schedule_for(resolution), guided=True) // rows
        yield ModelRow(f"image, guidance 3, batch {rows}", resolution, seconds / rows, cpu / rows, flops=flops)


def step_rows(model: ImagePolicy, resolution: int) -> Iterator[ModelRow]:
    """Measure DPO steps: with everything that the stage trains, with the update, and with frozen parts."""
    model.train()

    def measure(work: str, function: Callable, *args, counted: bool = True) -> ModelRow:
        memory = peak_memory(function, model, resolution, *args)  # and a first step, which takes longer
        model.zero_grad()
        seconds, cpu = measured(function, model, resolution, *args)
        model.zero_grad()
        ids_BT = batch(model, 2, 2, resolution, text=TEXT)["input_ids"]
        flops = step_flops(model, shape_of(model, ids_BT, schedule_for(resolution))) if counted else None
        return ModelRow(work, resolution, seconds, cpu, memory, flops)

    freeze(model, STAGES["dpo"])
    yield measure("DPO step", step)
    optimizer = prepared_adamw(model)
    whole = measure("DPO step, AdamW", update, optimizer)
    assert whole.memory is not None
    whole.memory += sum(part.nbytes for state in optimizer.state.values() for part in state.values())
    yield whole
    del optimizer
    freeze(model, STAGES["dpo"].without((LANGUAGE_INPUTS,)))
    yield measure(f"DPO step, {LANGUAGE_INPUTS} frozen", step)
    yield measure("DPO step, states stored", step, states_of(model, resolution), counted=False)


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
    columns = ("work", "px", "s", "CPU s", "MiB", "GFLOP/s of mm", "of it")
    table = results_table("the model, fp32, one thread", columns, left=("work",))
    for resolution in resolutions:
        for row in (*sampling_rows(model, resolution, options.batches), *step_rows(model, resolution)):
            peak = matrix_peak()
            memory = "" if row.memory is None else f"{row.memory / MIB:.0f}"
            share = "" if row.flops is None else f"{row.flops / row.cpu / peak:.0%}"
            figures = f"{row.seconds:.3f}", f"{row.cpu:.3f}", memory, f"{peak / 1e9:.1f}", share
            table.add_row(row.work, str(resolution), *figures)
    print_table(table)
    return 0


if __name__ == "__main__":
    make_outputs_lasting()
    sys.exit(main())
