"""Breakdown of training time, logged as ``time/...``: data, waiting, forward, backward, optimizer.

Only accounting: nothing is synchronised for it. On a GPU, whose kernels run beside Python, a part may hold time that
belongs to an earlier one; their sum is right.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Trainer as MixedInto
else:
    MixedInto = object

PARTS = ("data", "wait", "forward", "backward", "optimizer")


class StepClock:
    """Seconds by part. A part measured inside another one does not count for the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.total: dict[str, float] = dict.fromkeys(PARTS, 0.0)
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
        """Return the seconds of each part since the last call."""
        found = {part: self.seconds[part] for part in PARTS}
        self.seconds.clear()
        self.total = {part: self.total[part] + seconds for part, seconds in found.items()}
        return {f"time/{part}": seconds for part, seconds in found.items()}


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

    def training_step(self, *args, **kwargs):
        with self.clock.measure("backward"):  # without what is measured inside: forward and optimizer
            return super().training_step(*args, **kwargs)

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
