"""Exponential moving average of the tensors that a stage trains: with a recipe's ``ema``, the result of the stage.

What a stage hands on is the average: its final weights and, in SFT, those that sample. Online methods draw with the
trained weights themselves while they train, since their ratios are of these.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from learners.reference import replaced

AVERAGE = "average.safetensors"
"""File of the average in a training checkpoint."""


class AverageWeights(TrainerCallback):
    """Average of a model's tensors ``names`` in fp32. Every rank must hold them whole: ZeRO 0 to 2.

    It begins as the first weights. After step t it moves by 1 - d towards the weights, where d is the smaller of
    ``decay`` and (1 + t) / (10 + t): a short stage is not held back by its start.
    """

    def __init__(self, model: nn.Module, names: list[str], decay: float):
        self.decay = decay
        self._parameters = {name: model.get_parameter(name) for name in names}
        self._average = {name: own.detach().float().clone() for name, own in self._parameters.items()}

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, own in self._parameters.items():
            self._average[name] = self._average[name].to(own.device).lerp_(own.float(), share)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Compute with the average instead of the trained tensors, in their dtype, without gradients."""
        parameters = list(self._parameters.values())
        with replaced(parameters, [self._average[name].to(own) for name, own in self._parameters.items()]):
            yield

    def save(self, folder: Path) -> None:
        """Write the average into a training checkpoint."""
        save_file({name: average.cpu() for name, average in self._average.items()}, folder / AVERAGE)

    def load(self, folder: Path) -> None:
        """Read the average of a training checkpoint, into tensors of usual alignment, on which rounding depends."""
        for name, average in load_file(folder / AVERAGE).items():
            self._average[name].copy_(average)
