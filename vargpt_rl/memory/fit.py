"""Check that a run's memory estimate fits its devices, before anything starts."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from actors.config import PlacementConfig, RolloutConfig
from actors.resources import per_gpu
from configs.schema import LoopConfig
from learners.config import LearnerConfig
from vargpt_rl.memory.plan import MemoryPlan, bound, plan, trains
from vargpt_rl.memory.rollout import RolloutMemory
from vargpt_rl.memory.training import TrainingMemory
from vargpt_rl.memory.units import gib


@dataclass(frozen=True)
class Devices:
    """The devices that processes run on: GPUs, or without any the machines' memory."""

    gpus: int
    gpu_memory: int
    """Bytes per GPU."""
    memory: int
    """Bytes of the machines."""

    @property
    def room(self) -> int:
        """Bytes of one device, which its processes share."""
        return self.gpu_memory if self.gpus else self.memory


def gpu_memory() -> int:
    """Return the bytes of this process's first GPU."""
    return torch.cuda.get_device_properties(0).total_memory


@dataclass(frozen=True)
class Load:
    """The workers and learner ranks on one device in one stage."""

    workers: int
    rollout: RolloutMemory
    ranks: int
    training: TrainingMemory

    @property
    def total(self) -> int:
        return self.workers * self.rollout.total + self.ranks * self.training.total

    @property
    def step(self) -> str:
        return f"{self.training.stage if self.ranks else 'sampling'} at {self.training.resolution} px"

    @property
    def remedies(self) -> str:
        """Settings that reduce the load and are not in effect yet."""
        recipe, key = self.training.recipe, f"{self.training.stage}.recipe"
        found = {
            "a lower rollout.batch_size": self.workers > 0,
            f"a lower {key}.micro_batch": self.ranks > 0 and recipe.micro_batch > 1,
            f"{key}.gradient_checkpointing=1": self.ranks > 0 and recipe.gradient_checkpointing != 1,
            f"{key}.zero=3": self.ranks > 0 and recipe.zero < 3,
            "more learner.ranks": self.ranks == 1,
        }
        return " or ".join(text for text, helps in found.items() if helps)

    def __str__(self) -> str:
        groups = (self.workers, "rollout worker", self.rollout), (self.ranks, "learner rank", self.training)
        return " and ".join(f"{count} {name}{'s' * (count > 1)} of {need}" for count, name, need in groups if count)


def loads(
    plan: MemoryPlan, rollout: RolloutConfig, learner: LearnerConfig, placement: PlacementConfig, on_gpu: bool
) -> list[Load]:
    """List the loads of a device: all processes on a CPU, or those that the placement puts on one GPU."""
    counts = [(rollout.workers, learner.ranks)]
    if on_gpu:
        filled = per_gpu(rollout, learner.gpus_per_rank, placement)
        counts = [(min(workers, rollout.workers), min(ranks, learner.ranks)) for workers, ranks in filled]
    by_resolution = {need.resolution: need for need in plan.rollouts}
    return [
        Load(workers, by_resolution[training.resolution], ranks, training)
        for workers, ranks in counts
        for training in plan.training
    ]


def fullest(
    plan: MemoryPlan, rollout: RolloutConfig, learner: LearnerConfig, placement: PlacementConfig, on_gpu: bool
) -> Load:
    """Find the largest load of a device."""
    return max(loads(plan, rollout, learner, placement, on_gpu), key=lambda load: load.total)


def refusal(plan: MemoryPlan, config: LoopConfig, devices: Devices) -> str | None:
    """Explain why the run does not fit, with the sum; None if it fits."""
    load = fullest(plan, config.rollout, config.learner, config.placement, devices.gpus > 0)
    if load.total <= devices.room:
        return None
    return (
        f"{load.step} needs {gib(load.total)} on one {'GPU' if devices.gpus else 'machine'}, which has "
        f"{gib(devices.room)}: {load}; to reduce this, use {load.remedies}"
    )


def check_fits(config: LoopConfig, model: PreTrainedConfig, devices: Devices) -> None:
    """Raise ValueError, with the sum, if a stage of the run needs more memory than there is."""
    if reason := _excess(config, model, devices):
        raise ValueError(reason)


def _excess(config: LoopConfig, model: PreTrainedConfig, devices: Devices) -> str | None:
    """Explain why a run does not fit; None if it does, or if it has no stage that can be planned."""
    on_gpu = devices.gpus > 0
    if not trains(config) or refusal(bound(config, model, on_gpu), config, devices) is None:
        return None  # the bound is quick, and enough for runs far from the limit
    return refusal(plan(config, model, on_gpu), config, devices)


def largest_batch(
    config: LoopConfig, model: PreTrainedConfig, devices: Devices, resolution: int, sizes: Sequence[int]
) -> int:
    """Return the largest of the ascending ``sizes`` of a worker's batch that fits at a resolution, at least the first.

    The stages that train at other resolutions do not count.
    """
    there = config.at_resolution(resolution)

    def does_not_fit(size: int) -> bool:
        return _excess(there.with_batch_size(resolution, size), model, devices) is not None

    if not does_not_fit(sizes[-1]):  # usually
        return sizes[-1]
    return sizes[bisect_left(sizes, True, lo=1, hi=len(sizes) - 1, key=does_not_fit) - 1]
