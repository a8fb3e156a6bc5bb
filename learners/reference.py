"""The reference of a stage, from the model that trains: its trained tensors as the stage found them.

With an adapter these are small, so the reference needs no second model. At an adapter's first stage they are the
adapter without effect, that is, the model with the adapter off.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def replaced(parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> Iterator[None]:
    """Compute with ``values`` instead of the parameters' own, without gradients."""
    trained = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        with torch.no_grad():
            yield
    finally:
        for parameter, own in zip(parameters, trained, strict=True):
            parameter.data = own


class StartWeights:
    """Copies of a model's tensors ``names``, to score with later. Every rank must hold them whole: ZeRO 0 to 2."""

    def __init__(self, model: nn.Module, names: list[str]):
        self._parameters = [model.get_parameter(name) for name in names]
        self._start = [parameter.detach().clone() for parameter in self._parameters]

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Compute with the copies instead of the trained tensors, without gradients."""
        self._start = [start.to(own) for start, own in zip(self._start, self._parameters, strict=True)]
        with replaced(self._parameters, self._start):
            yield
