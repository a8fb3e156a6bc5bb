"""Settings that are auto until a run starts: ``dtype`` and ``rollout.batch_size``.

Both change numbers through rounding, so each is found once and recorded as a step: a resumed run, on whatever machine,
computes as it began.
"""

import logging
import time
from collections.abc import Callable

import torch

from actors.config import AUTO
from actors.pool import RolloutPool
from actors.resources import Placement
from configs.schema import LoopConfig
from vargpt_rl.common.dtypes import chosen_dtype
from vargpt_rl.data.samples import Prompt
from vargpt_rl.driver.run import Run
from vargpt_rl.memory.fit import Devices, largest_batch
from vargpt_rl.memory.plan import model_config
from vargpt_rl.model.prompt import REPLY

logger = logging.getLogger(__name__)

DTYPE = "dtype"
BATCH_SIZE = "batch_size"
"""Names of the steps."""
SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Batch sizes that are tried."""
GOOD_ENOUGH = 0.95
"""A batch that reaches this share of the best speed is as good as the best."""
PROBE_S = 15.0
"""Seconds after which no larger batch is tried at a resolution."""
ROUNDS = 2
"""Times that each batch is drawn; the faster one counts, because other work may disturb one."""


def settled_dtype(config: LoopConfig, run: Run, on_gpu: bool) -> str:
    """Return fp32 or bf16 for ``dtype``: what the run began with, or for a new run what suits this machine."""
    here = "bf16" if chosen_dtype(config.dtype, on_gpu) == torch.bfloat16 else "fp32"
    began = run.state["steps"].get(DTYPE, {"dtype": here})["dtype"]
    if began != here:
        run.note(f"dtype=auto: resuming in {began}, in which the run began; on this machine it would be {here}")
    return began


def record_dtype(config: LoopConfig, run: Run, placement: Placement) -> None:
    """Record what ``dtype=auto`` became, unless that is done."""
    if config.dtype == AUTO:
        run.step(DTYPE, lambda: {"dtype": "bf16" if placement.bf16 else "fp32"})


def batch_limits(config: LoopConfig, run: Run, model: str, find_devices: Callable[[], Devices]) -> dict[int, int]:
    """Return the largest batch that fits, for each resolution whose batch size is auto and not recorded yet.

    ``find_devices`` is called if there is any.
    """
    if BATCH_SIZE in run.state["steps"]:
        return {}
    by_resolution = {pixels: config.at_resolution(pixels) for pixels in config.resolutions}
    unknown = {pixels: there for pixels, there in by_resolution.items() if there.rollout.batch_size == AUTO}
    if not unknown:
        return {}
    devices = find_devices()
    return {
        pixels: largest_batch(there, model_config(model, pixels), devices, pixels, SIZES)
        for pixels, there in unknown.items()
    }


def settled_batch_size(config: LoopConfig, run: Run, pool: RolloutPool, limits: dict[int, int]) -> LoopConfig:
    """Return settings with numbers in place of auto: recorded ones, or the best within `batch_limits`."""

    def find() -> dict:
        return {str(pixels): _best(config.at_resolution(pixels), run, pool, most) for pixels, most in limits.items()}

    sizes = run.step(BATCH_SIZE, find) if limits or BATCH_SIZE in run.state["steps"] else {}
    for pixels, size in sizes.items():
        config = config.with_batch_size(int(pixels), size)
    return config


def _best(settings: LoopConfig, run: Run, pool: RolloutPool, largest: int) -> int:
    """Return the best batch size at the resolution of these settings, and note the speeds that were measured."""
    pixels = settings.last_resolution
    prompt = Prompt("probe", "a picture", REPLY)
    jobs = [(prompt, seed) for seed in range(largest)]
    began = time.monotonic()
    pool.time_batch(jobs[:1], pixels, settings.sampling)  # kernels are chosen, tables made
    speeds: dict[int, float] = {}
    for size in (size for size in SIZES if size <= largest):
        try:
            seconds = min(pool.time_batch(jobs[:size], pixels, settings.sampling) for _ in range(ROUNDS))
        except torch.cuda.OutOfMemoryError as error:
            if size == 1:
                raise
            logger.warning("%d images at %d px do not fit: %s", size, pixels, error)
            break
        speeds[size] = size / seconds
        if speeds[size] < GOOD_ENOUGH * max(speeds.values()) or time.monotonic() - began > PROBE_S:
            break
    best = best_size(speeds)
    measured = ", ".join(f"{size}: {speed:.2g}" for size, speed in speeds.items())
    bound = f"; at most {largest} fit" if largest < SIZES[-1] else ""
    run.note(f"rollout.batch_size=auto: {best} at {pixels} px, by images/s of a worker ({measured}{bound})")
    return best


def best_size(speeds: dict[int, float]) -> int:
    """Return the smallest size whose speed is nearly the best."""
    return min(size for size, speed in speeds.items() if speed >= GOOD_ENOUGH * max(speeds.values()))
