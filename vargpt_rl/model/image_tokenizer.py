"""Image tokenizer: a convolutional autoencoder with stride 16 around multi-scale binary spherical quantisation.

Follows the released VAE (specification, section 2). Deviation: the number of group-norm groups is configurable, since
the tiny model's narrow layers are not divisible by the release's 32.

Shape legend: B batch, H W image, C or c channels, h w latent grid, d bits a token, L image tokens.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from vargpt_rl.model.bits import Bits, residual, resize, to_codes
from vargpt_rl.model.multiscale import Quantised, to_map, to_tokens

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Maps reconstructed and original images, float [B, 3, H, W] each, to a scalar loss."""


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with group norms, added to the input."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x_BChw: torch.Tensor) -> torch.Tensor:
        rest = self.conv1(F.silu(self.norm1(x_BChw)))
        rest = self.conv2(F.silu(self.norm2(rest)))
        return self.shortcut(x_BChw) + rest


class Downsample(nn.Module):
    """Stride-2 convolution, padded by one pixel on the right and bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BChw: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x_BChw, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2 and a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BChw: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x_BChw, scale_factor=2.0, mode="nearest"))


class Attention(nn.Module):
    """Single-head self attention over all cells of the grid, added to the input."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BChw: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x_BChw)).flatten(2).transpose(1, 2).chunk(3, -1)
        seen = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x_BChw + self.proj(seen.transpose(1, 2).view_as(x_BChw))


def one_by_one(module: Callable[[torch.Tensor], torch.Tensor], batch_Bchw: torch.Tensor) -> torch.Tensor:
    """Apply a convolutional module to each item of a batch by itself, with channels innermost in memory.

    An item's result does not depend on its batch, and on CPUs this is faster: the activations of one image stay in
    the caches.
    """
    items = batch_Bchw.split(1)
    return torch.cat([module(item_1chw.contiguous(memory_format=torch.channels_last)) for item_1chw in items])


def _middle(width: int, groups: int, attention: bool) -> nn.Sequential:
    between = [Attention(width, groups)] if attention else []
    return nn.Sequential(ResidualBlock(width, width, groups), *between, ResidualBlock(width, width, groups))


class Encoder(nn.Module):
    """Maps images to latent features. ``attention`` follows each block of the coarsest level, and in the middle."""

    def __init__(self, channels: list[int], blocks: int, groups: int, depth: int, attention: bool = False):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        levels = []
        width = channels[0]
        for level, out in enumerate(channels):
            layers: list[nn.Module] = []
            for _ in range(blocks):
                layers.append(ResidualBlock(width, out, groups))
                width = out
                if attention and level + 1 == len(channels):
                    layers.append(Attention(width, groups))
            if level + 1 < len(channels):
                layers.append(Downsample(width))
            levels.append(nn.Sequential(*layers))
        self.levels = nn.ModuleList(levels)
        self.middle = _middle(width, groups, attention)
        self.norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, depth, 3, padding=1)

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(images_B3HW)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """Maps latents to images; ``attention`` as in the encoder."""

    def __init__(self, channels: list[int], blocks: int, groups: int, depth: int, attention: bool = False):
        super().__init__()
        width = channels[-1]
        self.conv_in = nn.Conv2d(depth, width, 3, padding=1)
        self.middle = _middle(width, groups, attention)
        levels = []
        for level in reversed(range(len(channels))):
            layers: list[nn.Module] = []
            for _ in range(blocks + 1):
                layers.append(ResidualBlock(width, channels[level], groups))
                width = channels[level]
                if attention and level + 1 == len(channels):
                    layers.append(Attention(width, groups))
            if level:
                layers.append(Upsample(width))
            levels.append(nn.Sequential(*layers))
        self.levels = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, latent_Bdhw: torch.Tensor) -> torch.Tensor:
        x = self.middle(self.conv_in(latent_Bdhw))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class ImageTokenizer(nn.Module, Bits):
    """Converts images in [-1, 1] to bits and back."""

    def __init__(self, config):
        super().__init__()
        channels = [config.base_channels * m for m in config.channel_multipliers]
        args = (channels, config.blocks_per_level, config.norm_groups, config.bits)
        self.encoder = Encoder(*args)
        self.decoder = Decoder(*args)

    def features(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """Encode images float [B, 3, H, W] in [-1, 1] as raw latent features [B, d, H/16, W/16]."""
        return self.encoder(images_B3HW)

    def encode(self, images_B3HW: torch.Tensor) -> Quantised:
        """Convert images to bits and decoder inputs, on the schedule of their size."""
        return self.quantise(self.features(images_B3HW), self.schedule_for(*images_B3HW.shape[-2:]))

    def decode(self, summed_Bdhw: torch.Tensor) -> torch.Tensor:
        """Decode summed codes to images float [B, 3, H, W] in [-1, 1]."""
        return one_by_one(self.decoder, summed_Bdhw).clamp(-1, 1)

    def training_loss(self, images_B3HW: torch.Tensor, criterion: Criterion) -> torch.Tensor:
        """Return the scalar ``criterion`` of reconstructed images, before the clamp, and their originals."""
        return criterion(self.reconstruct(images_B3HW), images_B3HW)

    def reconstruct(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """Encode and decode images differentiably, to train the tokenizer; the result is not clamped.

        Straight-through estimator scale by scale: the gradient of each code is passed to the unit-length remainder it
        rounds, with the coarser scales held constant.
        """
        schedule = self.schedule_for(*images_B3HW.shape[-2:])
        features = self.features(images_B3HW)
        summed = torch.zeros_like(features)
        for grid in schedule:
            unit = residual(features, summed.detach(), grid)
            code = to_map(to_codes(to_tokens(unit) > 0, unit.dtype), grid)
            summed = summed + resize(unit + (code - unit).detach(), schedule[-1])
        return self.decoder(summed)
