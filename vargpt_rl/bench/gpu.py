"""Measure one GPU within nine minutes: ``python -m vargpt_rl.bench.gpu [--tiny] [--deadline 540] [--out FOLDER]``.

A plain checkout suffices, with torch, transformers, safetensors, numpy and pillow; nothing is downloaded. The model has
random weights in bf16 (fp32 on a CPU) and the size of the release, or the stated fraction of its layers that fits:

- sampling with guidance in growing batches: images a second, share of the peak of a matrix product, peak memory;
- DPO and SFT steps with fp32 master weights: seconds, model FLOPs utilisation, memory beside the memory plan;
- which kernels attention ran in, and what kinds of kernels take the time;
- hashing the tensors that DPO trains, and swapping them into the model from a file;
- log-probabilities of the same bits in bf16 and fp32.

It prints one Markdown table and writes ``gpu.md`` and ``gpu.json``, again after each row, so that a run that is cut has
what it measured. A measurement that would end after the deadline, or does not fit into memory, has a row that says so.
"""

import argparse
import gc
import json
import logging
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers

from learners.config import Recipe
from learners.flops import drawing_flops, matrix_peak, shape_of, step_flops
from vargpt_rl.bench.gpu_checks import attention_kernels, hash_and_swap, precision, time_shares
from vargpt_rl.common.streams import make_outputs_lasting
from vargpt_rl.losses.supervised import sft_loss
from vargpt_rl.memory.inputs import batch, preference_loss
from vargpt_rl.memory.tracker import META, meta_model
from vargpt_rl.memory.training import TrainingMemory, activations, parameter_sizes, states
from vargpt_rl.memory.units import GIB, RUNTIME
from vargpt_rl.model.configuration import VargptConfig
from vargpt_rl.model.generate import SamplingConfig, generate_images, to_images
from vargpt_rl.model.graphs import DrawingGraphs
from vargpt_rl.model.hub import EMBEDDED
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.scales import schedule_for
from vargpt_rl.stages import STAGES, freeze

TEXT = 32
"""Text tokens per row."""
SAMPLING = SamplingConfig(cfg=3.0)
FRACTIONS = (1.0, 0.5, 0.25, 0.125)
"""Shares of the release's layers, tried in this order until a DPO step fits."""
ROOM = 0.9
"""Share of the GPU's memory that may be planned."""
SHARES_BATCH = 16
"""Largest batch whose kernels are listed."""
GRAPH_BATCH = 16
"""Largest batch that is sampled as a CUDA graph too."""
RESERVE_S = 90.0
"""Seconds kept for what comes after sampling and training."""
STEPS = 3
"""Steps timed after a first one; the median counts."""

logger = logging.getLogger(__name__)


@dataclass
class GpuRow:
    """One measurement; what does not apply is None."""

    work: str
    resolution: int | None = None
    batch: int | None = None
    seconds: float | None = None
    speed: str = ""
    share: float | None = None
    """Of the peak."""
    memory: int | None = None
    """Peak bytes of torch's allocator; None on a CPU."""
    plan: int | None = None
    """Bytes that the memory plan expects, without the runtime."""
    note: str = ""


@dataclass
class Bench:
    """The model under measurement and the rows so far."""

    model: Vargpt
    device: torch.device
    peak: float
    """Operations per second of a matrix product."""
    ends: float
    """Deadline in seconds of ``time.monotonic``."""
    out: Path
    """Folder of the files."""
    facts: dict[str, str | float | None] = field(default_factory=dict)
    """Device, versions and sizes, for the files' heading."""
    rows: list[GpuRow] = field(default_factory=list)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.ends - time.monotonic()

    def timed(self, function: Callable[[], object]) -> float:
        """Seconds of a call, all its kernels included."""
        self.synchronize()
        began = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - began

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def reset_memory(self) -> None:
        """Free what is unused and start to watch the peak."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def add(self, row: GpuRow) -> None:
        """Take a row that is filled in, and write the files."""
        self.rows.append(row)
        logger.info("%s %s px, batch %s: %s s %s", row.work, row.resolution, row.batch, row.seconds, row.note)
        self.write()

    def table(self) -> str:
        """Format the facts and the rows so far."""
        written = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in self.facts.items()}
        heading = ", ".join(f"{name} {value}" for name, value in written.items())
        return f"{heading}\n\n{markdown(self.rows)}\n"

    def write(self) -> None:
        """Write ``gpu.md`` and ``gpu.json``."""
        self.out.mkdir(parents=True, exist_ok=True)
        found = self.facts | {"rows": [asdict(row) for row in self.rows]}
        (self.out / "gpu.md").write_text(self.table())
        (self.out / "gpu.json").write_text(json.dumps(found, indent=1))

    def attempt(self, row: GpuRow, function: Callable[[GpuRow], None], expected_s: float) -> bool:
        """Fill in a row, or say why not; False if it did not fit or there was no time."""
        if self.left() - RESERVE_S < expected_s:
            row.note = f"left out: expected {expected_s:.0f} s, too close to the deadline"
            self.add(row)
            return False
        self.reset_memory()
        try:
            function(row)
        except torch.cuda.OutOfMemoryError:
            row.note = "out of memory"
        row.memory = self.peak_memory()
        self.add(row)
        return not row.note


def sized_config(tiny: bool, fraction: float) -> VargptConfig:
    """Return the configuration of the embedded model, or of a share of the release's layers."""
    if tiny:
        return VargptConfig.from_pretrained(EMBEDDED)
    config = VargptConfig()
    text = config.text_config
    text.num_hidden_layers = max(1, round(fraction * text.num_hidden_layers))
    if text.layer_types:
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    config.decoder_config.depth = max(1, round(fraction * config.decoder_config.depth))
    return config


def planned(config: VargptConfig, stage: str, resolution: int, rows: int, dtype: torch.dtype) -> int:
    """Return the memory plan of a step of one rank without ZeRO, in bytes without the runtime."""
    row = STAGES[stage]

    def loss(model) -> torch.Tensor:
        inputs = batch(model, rows, rows, resolution, text=TEXT)
        if stage == "dpo":
            return preference_loss(model, inputs, resolution)
        return sft_loss(model, inputs, row.noise, row.text_weight)[0]

    with META:
        whole = Vargpt(config)
    held = states(parameter_sizes(whole, row), dtype, 0, 1, accumulates=False, on_gpu=True)
    kept = activations(meta_model(config, dtype), row, loss, 0)
    return TrainingMemory(stage, resolution, Recipe(), **held, activations=kept).total - RUNTIME


def fitting(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[VargptConfig, float]:
    """Choose the largest fraction whose DPO step on one pair fits; the last one if none does."""
    if options.tiny or device.type == "cpu":
        return sized_config(options.tiny, options.fraction or 1.0), options.fraction or 1.0
    room = ROOM * torch.cuda.mem_get_info(device)[0]
    fractions = [options.fraction] if options.fraction else FRACTIONS
    for fraction in fractions:
        config = sized_config(False, fraction)
        if planned(config, "dpo", max(options.resolutions), 2, dtype) <= room:
            break
    return config, fraction


def make_model(config: VargptConfig, device: torch.device, dtype: torch.dtype) -> Vargpt:
    """Create the model with random weights on its device; the seed is fixed."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Vargpt(config)  # not cast: rotary frequencies stay in fp32
    finally:
        torch.set_default_dtype(before)


def measure_sampling(bench: Bench, resolutions: list[int], batches: list[int]) -> None:
    """Sample and decode growing batches, until one does not fit into memory or time.

    The first batch of a shape is not timed: cuDNN makes its attention kernels during it. Small batches are timed as
    CUDA graphs too.
    """
    bench.model.eval()
    for resolution in resolutions:
        last_s = 0.0
        last = 1
        for rows in batches:
            row = GpuRow("sampling, guidance 3", resolution, rows)
            if not bench.attempt(row, partial(time_sampling, bench, None, 1), 2 * last_s * rows / last):
                break
            last_s, last = row.seconds or 0.0, rows
            if bench.device.type == "cuda" and rows <= GRAPH_BATCH:
                row = GpuRow("the same as a CUDA graph", resolution, rows)
                bench.attempt(row, partial(time_sampling, bench, DrawingGraphs(), 2), 3 * last_s)


def time_sampling(bench: Bench, draw: DrawingGraphs | None, before: int, row: GpuRow) -> None:
    """Sample a batch ``before`` times, then time it."""
    assert row.resolution is not None and row.batch is not None
    once = sampling_of(bench, row.resolution, row.batch, draw)
    for _ in range(before):
        once()
    row.seconds = bench.timed(once)
    flops = drawing_flops(bench.model, row.batch, TEXT, schedule_for(row.resolution), guided=True)
    row.share = flops / row.seconds / bench.peak
    row.speed = f"{row.batch / row.seconds:.2f} images/s"


def sampling_of(bench: Bench, resolution: int, rows: int, draw: DrawingGraphs | None = None) -> Callable[[], object]:
    """Return a function that samples and decodes a batch."""
    inputs = batch(bench.model, rows, rows, resolution, text=TEXT)
    ids = inputs["input_ids"][:, :TEXT].to(bench.device)
    mask = torch.ones_like(ids)
    size = (resolution, resolution)

    def sample() -> None:
        drawn = generate_images(bench.model, ids, mask, list(range(rows)), size, SAMPLING, draw=draw)
        to_images(bench.model, drawn.summed_Bdhw)

    return sample


def losses(bench: Bench, stage: str, resolution: int, rows: int) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    """Return the loss of a micro-batch, and its token ids."""
    model, row = bench.model, STAGES[stage]
    with bench.device:
        inputs = batch(model, rows, rows, resolution, text=TEXT)

    def loss() -> torch.Tensor:
        if stage != "dpo":
            return sft_loss(model, inputs, row.noise, row.text_weight)[0]
        with bench.device:
            return preference_loss(model, inputs, resolution)

    return loss, inputs["input_ids"]


class MasterWeights:
    """AdamW on fp32 copies of what trains, as DeepSpeed does it without ZeRO."""

    def __init__(self, model: Vargpt):
        self.own = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.masters = [parameter.detach().float().clone() for parameter in self.own]
        fused = self.own[0].is_cuda
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-5, fused=fused)

    @torch.no_grad()
    def step(self) -> None:
        """Update the masters by the gradients, and the model's weights from them."""
        for master, own in zip(self.masters, self.own, strict=True):
            master.grad = None if own.grad is None else own.grad.float()
            own.grad = None
        self.optimizer.step()
        for master, own in zip(self.masters, self.own, strict=True):
            own.copy_(master)
            master.grad = None


def measure_steps(
    bench: Bench, config: VargptConfig, stage: str, resolutions: list[int], micro_batches: list[int]
) -> None:
    """Train a few steps of DPO (pairs) or SFT (images). The optimizer's state is gone afterwards."""
    model = bench.model.train()
    freeze(model, STAGES[stage])
    weights = MasterWeights(model)
    rows_of = 2 if stage == "dpo" else 1
    for resolution in resolutions:
        last_s = 0.0
        for count in micro_batches:

            def train(row: GpuRow, rows: int = rows_of * count) -> None:
                assert row.resolution is not None
                loss, ids_BT = losses(bench, stage, row.resolution, rows)

                def once() -> None:
                    loss().backward()
                    weights.step()

                once()  # makes the optimizer's state
                row.seconds = sorted(bench.timed(once) for _ in range(STEPS))[STEPS // 2]
                flops = step_flops(model, shape_of(model, ids_BT, schedule_for(row.resolution)))
                row.share = flops / row.seconds / bench.peak
                row.speed = f"{rows / row.seconds:.2f} rows/s"

            row = GpuRow(f"{stage.upper()} step", resolution, count)
            row.plan = planned(config, stage, resolution, rows_of * count, model.dtype)
            if not bench.attempt(row, train, last_s * (STEPS + 1) * 4):
                model.zero_grad()
                break
            last_s = row.seconds or 0.0
    model.zero_grad()


def measure_shares(bench: Bench, work: str, resolution: int, rows: int, once: Callable[[], object]) -> None:
    """Add a row with what kinds of kernels take the time of a step."""
    once()
    seconds = bench.timed(once)
    row = GpuRow(f"{work}: kernels", resolution, rows, seconds=seconds)
    row.note = time_shares(once, bench.device, seconds)
    bench.add(row)


def measure_checks(bench: Bench, resolution: int, batches: list[int], folder: Path) -> None:
    """Check kernels and precision; hash and swap. The model is in fp32 afterwards."""
    model = bench.model.train()
    trained = freeze(model, STAGES["dpo"])
    loss, ids_BT = losses(bench, "dpo", resolution, 2)

    def gradients() -> None:
        loss().backward()
        model.zero_grad()

    found = attention_kernels(gradients, bench.device)
    bench.add(GpuRow("attention of a DPO step", resolution, 1, note=found))
    measure_shares(bench, "DPO gradients", resolution, 1, gradients)
    model.eval()
    for rows in {batches[0], max([rows for rows in batches if rows <= SHARES_BATCH], default=batches[0])}:
        measure_shares(bench, "sampling, guidance 3", resolution, rows, sampling_of(bench, resolution, rows))
    swapped = hash_and_swap(model, trained, folder, bench.synchronize)
    for work, (seconds, size) in swapped.items():
        speed = f"{size / seconds / 1e9:.2f} GB/s"
        bench.add(GpuRow(work, seconds=seconds, speed=speed, note=f"{size / 1e9:.2f} GB"))
    note = precision(model, ids_BT, resolution)
    bench.add(GpuRow("log-probabilities, bf16 against fp32", resolution, 2, note=note))


def markdown(rows: list[GpuRow]) -> str:
    """Format the rows as one Markdown table."""

    def cells(row: GpuRow) -> Iterator[str]:
        yield row.work
        for number in (row.resolution, row.batch):
            yield "" if number is None else str(number)
        yield "" if row.seconds is None else f"{row.seconds:.3f}"
        yield row.speed
        yield "" if row.share is None else f"{row.share:.1%}"
        for size in (row.memory, row.plan):
            yield "" if size is None else f"{size / GIB:.1f}"
        yield row.note

    columns = ["work", "px", "batch", "seconds", "speed", "of peak", "GiB", "plan GiB", "note"]
    lines = [columns, ["---"] * len(columns), *([*cells(row)] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line; exits with code 2 if it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the embedded model, at 64 px")
    parser.add_argument("--fraction", type=float, help="share of the release's layers (default: the largest that fits)")
    parser.add_argument("--deadline", type=float, default=540.0, help="seconds for everything (default 540)")
    parser.add_argument("--resolutions", type=int, nargs="+", help="pixels per side (default 256 512; 64 with --tiny)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64], help="images sampled at once")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4], help="pairs, or images, of a step")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of gpu.md and gpu.json")
    options = parser.parse_args(arguments)
    if options.fraction is not None and not 0 < options.fraction <= 1:
        parser.error(f"--fraction {options.fraction}: expected above 0 and at most 1")
    options.batches.sort()
    options.resolutions = options.resolutions or ([64] if options.tiny else [256, 512])
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table and write the files; return the exit code."""
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config, fraction = fitting(options, device, dtype)
    peak = matrix_peak(device, dtype)
    bench = Bench(make_model(config, device, dtype), device, peak, began + options.deadline, options.out)
    bench.facts = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in bench.model.parameters()),
        "layers of the release": None if options.tiny else fraction,
        "peak TFLOP/s": peak / 1e12,
    }
    measure_sampling(bench, options.resolutions, options.batches)
    for stage in ("dpo", "sft"):
        measure_steps(bench, config, stage, options.resolutions, sorted(options.micro_batches))
    measure_checks(bench, options.resolutions[0], options.batches, options.out)
    bench.facts["seconds"] = time.monotonic() - began
    bench.write()
    print(bench.table())
    return 0


if __name__ == "__main__":
    make_outputs_lasting()
    sys.exit(main())
