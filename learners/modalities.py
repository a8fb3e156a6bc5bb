"""Gradient norms of the text loss and of the image loss, each on its own.

One total norm hides a modality that drowns the other: the two differ by an order of magnitude in published runs. They
are measured beside training, on the same batch with the same noise, by one more forward pass and a backward pass for
each loss: more than twice a step's time, hence on every ``EVERY``-th step only.

Not under ZeRO 3: it takes parameters apart while autograd still asks for their sizes.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import nn

EVERY = 50
"""Steps from one measurement to the next: some 4 % more time."""


class ModalityGradients:
    """Adds up the gradient of each loss over the micro-batches and ranks of one step; ``norms`` are those of the sums.

    Works beside DeepSpeed's engine, not through it: parameters' gradients are never stored, nothing of its is touched.
    Each tensor's sum is kept on one rank only, in the tensor's dtype. As in ZeRO, every rank must have gradients for
    the same parameters.
    """

    def __init__(self, model: nn.Module, micro_batches: int):
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.ranks, self.rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        self.count = micro_batches * self.ranks
        self.sums: dict[str, dict[int, torch.Tensor]] = {}

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        """A micro-batch's losses by modality, as they enter the total; their graph is used up."""
        for left, (modality, loss) in zip(reversed(range(len(losses))), losses.items(), strict=True):
            self.sums.setdefault(modality, {})
            hooks = [p.register_hook(partial(self._take, modality, i)) for i, p in enumerate(self.parameters)]
            torch.autograd.grad(loss, self.parameters, retain_graph=left > 0, allow_unused=True)
            for hook in hooks:
                hook.remove()

    def _take(self, modality: str, index: int, gradient: torch.Tensor) -> torch.Tensor:
        """Add a gradient to its owner's sum, and give back zeros without memory: autograd would keep them all."""
        owner, share = index % self.ranks, gradient / self.count
        if self.ranks > 1:
            dist.reduce(share, owner)
        if self.rank == owner:
            sums = self.sums[modality]
            sums[index] = sums[index] + share if index in sums else share
        return gradient.new_zeros(()).expand_as(gradient)

    def norms(self) -> dict[str, float]:
        """By modality; the same on every rank, all of which take part. Starts afresh."""
        squares = [sum((t.double().square().sum() for t in sums.values()), 0.0) for sums in self.sums.values()]
        total = torch.tensor(squares, dtype=torch.float64, device=self.parameters[0].device)
        if self.ranks > 1:
            dist.all_reduce(total)
        norms = dict(zip(self.sums, total.sqrt().tolist(), strict=True))
        self.sums = {}
        return norms
