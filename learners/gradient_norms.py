"""Gradient norms of the text loss and of the image loss, each on its own.

One total norm hides a modality that drowns the other: the two differ by an order of magnitude in published runs. They
are measured beside training, on the same batch with the same noise, with one more forward pass and a backward pass per
loss: more than twice a step's time, hence only on every ``EVERY``-th step.

Not available under ZeRO-3, which partitions parameters while autograd still asks for their sizes.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import nn

EVERY = 50
"""Steps between two measurements; they add about 4 % to the time."""


class ModalityGradients:
    """Sums the gradient of each loss over the micro-batches and ranks of one step; `norms` returns the sums' norms.

    Bypasses DeepSpeed's engine: ``parameter.grad`` is never set and the engine's state is left alone. Each tensor's sum
    lives on one rank only, in the tensor's dtype. As in ZeRO, every rank must have gradients for the same parameters.
    """

    def __init__(self, model: nn.Module, micro_batches: int):
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.count = micro_batches * self.ranks
        self.sums: dict[str, dict[int, torch.Tensor]] = {}

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        """Add a micro-batch's losses by modality, weighted as in the total; frees their graph."""
        for left, (modality, loss) in zip(reversed(range(len(losses))), losses.items(), strict=True):
            self.sums.setdefault(modality, {})
            hooks = [p.register_hook(partial(self._take, modality, i)) for i, p in enumerate(self.parameters)]
            torch.autograd.grad(loss, self.parameters, retain_graph=left > 0, allow_unused=True)
            for hook in hooks:
                hook.remove()

    def _take(self, modality: str, index: int, gradient: torch.Tensor) -> torch.Tensor:
        """Add a gradient to its owner's sum; return zeros without memory, since autograd keeps what hooks return."""
        owner, share = index % self.ranks, gradient / self.count
        if self.ranks > 1:
            dist.reduce(share, owner)
        if self.rank == owner:
            sums = self.sums[modality]
            sums[index] = sums[index] + share if index in sums else share
        return gradient.new_zeros(()).expand_as(gradient)

    def norms(self) -> dict[str, float]:
        """Norms by modality, the same on every rank; resets the sums. Every rank must call it."""
        squares = [sum((t.double().square().sum() for t in sums.values()), 0.0) for sums in self.sums.values()]
        total = torch.tensor(squares, dtype=torch.float64, device=self.parameters[0].device)
        if self.ranks > 1:
            dist.all_reduce(total)
        norms = dict(zip(self.sums, total.sqrt().tolist(), strict=True))
        self.sums = {}
        return norms
