"""Memory of a learner rank.

Weights, gradients and optimizer state follow from the model's own parameters and DeepSpeed's ZeRO stage; activations
are counted by running the real losses on the meta device (`tracker`). DeepSpeed's own estimators
(``estimate_zero3_model_states_mem_needs``) do not serve here: they assume that every parameter is trained in half
precision, multiply by a buffer factor of 1.5, and leave out the optimizer's step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from learners.config import Recipe
from vargpt_rl.memory.tracker import MetaModel, counting
from vargpt_rl.memory.units import RUNTIME, breakdown, gib
from vargpt_rl.model.adapter import AdapterConfig
from vargpt_rl.model.unified import Unified
from vargpt_rl.stages import Stage, freeze

# DeepSpeed's defaults, in elements.
REDUCE_BUCKET = 5 * 10**8
"""Gradients reduced at once."""
LIVE_PARAMETERS = 10**9 + 5 * 10**7
"""Parameters that ZeRO-3 keeps gathered, including prefetched ones."""
SUB_GROUP = 10**9
"""Parameters that ZeRO-3 updates at once."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a learner rank in one stage."""

    stage: str
    resolution: int
    recipe: Recipe
    whole: int
    """The whole model while it is loaded, before ZeRO-3 partitions it."""
    weights: int
    gradients: int
    optimizer: int
    buffers: int
    """Communication buffers and gradient sums."""
    update: int
    """Held during the optimizer's step, instead of buffers and activations."""
    activations: int
    otherwise: int | None = None
    """Activations without gradient checkpointing or, if the stage has none, with that of every block, if requested."""

    @property
    def total(self) -> int:
        states = self.weights + self.gradients + self.optimizer
        return RUNTIME + max(self.whole, states + self.buffers + self.activations, states + self.update)

    def __str__(self) -> str:
        if self.total == RUNTIME + self.whole:
            return f"{gib(self.total)} (the whole model while it is loaded, runtime {gib(RUNTIME)})"
        names = ["weights", "gradients", "optimizer", "buffers", "activations"]
        if self.update > self.buffers + self.activations:
            names[3:] = ["update"]
        return breakdown(self, names)


MOMENTS_8_BIT = 2 * (1 + 4 / 256)
"""Bytes of two moments per trained parameter, in 8 bits: each block of 256 has a scale in fp32."""
MOMENTS = {"adamw": 8.0, "adamw_8bit": MOMENTS_8_BIT, "paged_adamw_8bit": MOMENTS_8_BIT}
"""Bytes of AdamW's moments per trained parameter. Paged ones count in full: each step needs them, and after a resume
they stay on the GPU."""


def states(
    sizes: list[tuple[int, bool]],
    dtype: torch.dtype,
    zero: int,
    ranks: int,
    accumulates: bool,
    on_gpu: bool,
    optimizer: str = "adamw",
    offload: bool = False,
) -> dict[str, int]:
    """Compute all of ``TrainingMemory`` but activations from each parameter's size and whether it is trained.

    ``accumulates``: a step has several micro-batches. A CPU allocates only the part of a buffer that is written. On a
    GPU, ``offload`` leaves the gradient of one parameter at a time; on a CPU it moves nothing.
    """
    width = dtype.itemsize
    is_half = width < 4
    total = sum(n for n, _ in sizes)
    trained = sum(n for n, is_trained in sizes if is_trained)
    own = {0: trained, 3: sum(-(-n // ranks) for n, is_trained in sizes if is_trained)}.get(zero, -(-trained // ranks))
    bucket = REDUCE_BUCKET if on_gpu else min(trained, REDUCE_BUCKET)
    reduced = bucket + min(trained, REDUCE_BUCKET)  # with its flattened copy
    master = 4 if is_half or zero else 0  # ZeRO keeps a copy even of fp32 weights
    step = width + 4 if is_half else width  # bytes per element: the flattened gradient, and its fp32 copy
    found = {
        "whole": total * width,
        "weights": total * width,
        "gradients": (own if zero >= 2 else trained) * width,
        "optimizer": round(own * (MOMENTS[optimizer] + master)),
        "buffers": 0,
        "update": own * 4 if is_half else 0,
    }
    again = own if accumulates else 0  # the last micro-batch's gradients, next to their sum
    if zero in (1, 2):
        found |= {"buffers": (reduced + again) * width, "update": own * step}
    if zero == 3:
        gathered = min(total, LIVE_PARAMETERS)
        found |= {
            "weights": sum(-(-n // ranks) for n, _ in sizes) * width,
            "buffers": (reduced + gathered) * width,
            "update": bucket * width + min(own, SUB_GROUP) * step,
        }
    if offload and on_gpu:
        largest = max((n for n, is_trained in sizes if is_trained), default=0)
        buffers = found["buffers"] - (again * width if zero == 2 else 0) + largest * width
        found |= {"gradients": 0, "optimizer": 0, "update": 0, "buffers": buffers}
    return found


def parameter_sizes(
    model: Unified, stage: Stage, adapter: AdapterConfig | None = None, without: tuple[str, ...] = ()
) -> list[tuple[int, bool]]:
    """Return each parameter's number of elements and whether the stage trains it, or its part of an ``adapter``.

    Parameters whose names start with one of ``without`` are left out.
    """
    freeze(model, stage, adapter)
    return [
        (parameter.numel(), parameter.requires_grad)
        for name, parameter in model.named_parameters()
        if not (without and name.startswith(without))
    ]


def activations(meta: MetaModel, stage: Stage, loss: Callable[[Unified], torch.Tensor], checkpointing: int) -> int:
    """Count the peak bytes of a loss and its backward pass, without the model and its finished gradients.

    With every n-th block recomputed (``checkpointing`` n), the peak lies between that of none and that of all.
    """
    if checkpointing < 2:
        return _peak(meta, stage, loss, bool(checkpointing))
    none, every = (_peak(meta, stage, loss, recompute) for recompute in (False, True))
    return none - (none - every) // checkpointing


def _peak(meta: MetaModel, stage: Stage, loss: Callable[[Unified], torch.Tensor], recompute: bool) -> int:
    model = meta.model.train()
    freeze(model, stage, meta.adapter)
    if recompute:
        model.gradient_checkpointing_enable()
    else:
        model.gradient_checkpointing_disable()
    with counting(meta) as tracker:
        loss(model).backward()
    return tracker.peak
