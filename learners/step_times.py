"""Breakdown of training time, logged as ``time/...``: data, waiting, forward, backward, optimizer.

``time/mfu`` is the share of the peak that the model's operations take (`learners.flops`), of the time without waiting.

Only accounting: nothing is synchronised for it. On a GPU, whose kernels run beside Python, a part may hold time that
belongs to an earlier one. The trainer's own work between the parts (callbacks, logging, saving), and kernels that end
during it, are in none: the sum is less than the time that passed, and ``mfu`` so much larger.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import Trainer as MixedInto
else:
    MixedInto = object

PARTS = ("data", "wait", "forward", "backward", "optimizer")


class StepClock:
    """Seconds by part. A part measured inside another one does not count for the outer one.

    ``flops`` are the operations since the last look, ``peak`` those per second that the machine can do, 0 if unknown.
    """

    def __init__(self, peak: float = 0.0) -> None:
        self.peak = peak
        self.seconds: dict[str, float] = defaultdict(float)
        self.total: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self.flops = 0
        self.total_flops = 0
        self._inside: list[float] = []

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of the block to ``part``."""
        began = time.perf_counter()
        self._inside.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self.seconds[part] += spent - self._inside.pop()
            if self._inside:
                self._inside[-1] += spent

    def take(self) -> dict[str, float]:
        """Return the seconds of each part since the last call, and ``time/mfu`` if a peak is known."""
        found = {part: self.seconds[part] for part in PARTS}
        flops = self.flops
        self.seconds.clear()
        self.flops = 0
        self.total = {part: self.total[part] + seconds for part, seconds in found.items()}
        self.total_flops += flops
        return {f"time/{part}": seconds for part, seconds in found.items()} | self._share(flops, found, "time/mfu")

    def whole(self) -> dict[str, float]:
        """Return the model FLOPs utilisation of all steps, as ``mfu``, if a peak is known."""
        return self._share(self.total_flops, self.total, "mfu")

    def _share(self, flops: int, seconds: dict[str, float], name: str) -> dict[str, float]:
        spent = sum(seconds.values()) - seconds["wait"]
        return {name: flops / spent / self.peak} if flops and self.peak and spent else {}


class TimedSteps(MixedInto):
    """Mixin that adds ``time/...`` to a ``transformers.Trainer`` under DeepSpeed; precedes it among the bases.

    Values are this rank's seconds since the last log. ``backward`` includes reducing gradients over ranks.
    """

    def __init__(self, *args, **kwargs):
        self.clock = StepClock()
        self.last_waited = 0.0
        super().__init__(*args, **kwargs)

    def seconds_waited(self) -> float:
        """Seconds in which the data loader waited for the driver so far; they are part of getting a batch."""
        return 0.0

    def count_flops(self, inputs: dict[str, torch.Tensor]) -> int:
        """Count the operations of a micro-batch; 0 if they are not known."""
        return 0

    def _prepare_for_training(self, *args):
        prepared = super()._prepare_for_training(*args)
        self.deepspeed.step = _timed(self.deepspeed.step, self.clock)
        self.last_waited = self.seconds_waited()
        return prepared

    def get_batch_samples(self, *args):
        with self.clock.measure("data"):
            samples = super().get_batch_samples(*args)
        waited = self.seconds_waited() - self.last_waited
        self.last_waited += waited
        self.clock.seconds["wait"] += waited
        self.clock.seconds["data"] -= waited
        return samples

    def training_step(self, model, inputs, *args, **kwargs):
        self.clock.flops += self.count_flops(inputs)
        with self.clock.measure("backward"):  # without what is measured inside: forward and optimizer
            return super().training_step(model, inputs, *args, **kwargs)

    @contextmanager
    def compute_loss_context_manager(self):
        with self.clock.measure("forward"), super().compute_loss_context_manager():
            yield

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.clock.take()
        super().log(logs, start_time)


def _timed(step: Callable, clock: StepClock) -> Callable:
    """Measure DeepSpeed's step: clipping, the optimizer, and gathering updated weights."""

    @wraps(step)
    def call(*args, **kwargs):
        with clock.measure("optimizer"):
            return step(*args, **kwargs)

    return call
