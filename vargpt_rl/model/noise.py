"""Random numbers of sampling: each image draws its own from its seed, whatever its batch and the device."""

from collections.abc import Callable

import torch

Source = Callable[..., torch.Tensor]
"""``torch.rand`` or ``torch.randn``."""


class SeededNoise:
    """Noise of a batch of images, drawn on the CPU."""

    def __init__(self, seeds: list[int], device: torch.device | str = "cpu"):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device = device

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Draw numbers in [0, 1): [B, *shape]."""
        return self.draw(torch.rand, shape, dtype)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Draw standard normal numbers: [B, *shape]."""
        return self.draw(torch.randn, shape, dtype)

    def draw(self, source: Source, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Draw the next numbers of each image: [B, *shape]."""
        drawn = [source(*shape, generator=generator, dtype=dtype) for generator in self.generators]
        return torch.stack(drawn).to(self.device)
