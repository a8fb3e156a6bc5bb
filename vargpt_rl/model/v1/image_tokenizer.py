"""Image tokenizer of v1: a convolutional autoencoder with stride 16 around a multi-scale codebook.

Each scale looks up the codes nearest to the remainder of the coarser scales, upsamples them, and smooths them with a
convolution that neighbouring scales share (VARGPT, section 7.2; specification, section 2). Unlike bits, these steps
have weights, so decoder inputs can be recomputed only with the image tokenizer.

It is trained with VAR's codebook losses. An addition to the published code: codes that no image has used for a while
are re-initialised at a remainder of the current images.

Shape legend: B batch, H W image, h w latent grid, d latent channels, V codes, n tokens of one scale,
s symbols a token (one).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vargpt_rl.model.image_tokenizer import Criterion, Decoder, Encoder, one_by_one
from vargpt_rl.model.multiscale import MultiScale, Quantised, to_map, to_tokens
from vargpt_rl.model.scales import Schedule
from vargpt_rl.model.v1.configuration import V1ImageTokenizerConfig

COMMITMENT = 0.25
"""Weight of the commitment loss (features to codes) relative to the codebook loss (codes to features) (VAR)."""
PATIENCE = 25
"""Training steps after which an unused code is re-initialised."""


def conv_of_scale(scales: int, convs: int) -> list[int]:
    """Assign each scale its shared convolution: the nearest, with both spread evenly over [0, 1].

    Two of the release's ten scales lie exactly between two convolutions; numpy's rounding decides, as it did there.
    """
    margin = 1 / 3 / convs if convs == 4 else 1 / 2 / convs
    ticks = np.linspace(margin, 1 - margin, convs)
    return [int(np.abs(ticks - k / max(scales - 1, 1)).argmin()) for k in range(scales)]


def shrink(map_Bdhw: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Average over the cells of a smaller grid."""
    return map_Bdhw if map_Bdhw.shape[-2:] == torch.Size(grid) else F.interpolate(map_Bdhw, size=grid, mode="area")


class V1ImageTokenizer(nn.Module, MultiScale):
    """Converts images in [-1, 1] to indices of the codebook and back."""

    def __init__(self, config: V1ImageTokenizerConfig):
        super().__init__()
        self.config = config
        channels = [config.base_channels * m for m in config.channel_multipliers]
        d = config.latent_channels
        args = (channels, config.blocks_per_level, config.norm_groups, d, True)
        self.encoder = Encoder(*args)
        self.decoder = Decoder(*args)
        self.to_latent = nn.Conv2d(d, d, 3, padding=1)
        self.from_latent = nn.Conv2d(d, d, 3, padding=1)
        self.codebook = nn.Embedding(config.codes, d)
        self.residual = nn.ModuleList(nn.Conv2d(d, d, 3, padding=1) for _ in range(config.residual_convs))
        # Training steps since each code was used. Not a buffer: from_pretrained leaves buffers unset that no file has.
        self.idle = torch.zeros(0)
        self.conv_of_scale = conv_of_scale(len(config.sides), config.residual_convs)

    def schedule_for(self, height: int, width: int | None = None) -> Schedule:
        return self.config.schedule_for(height, width)

    def label(self, features_Bdhw, summed_Bdhw, grid):
        """Find the nearest codes by squared Euclidean distance in fp32, the first of equals: int32 [B, n, 1]."""
        return self._nearest(to_tokens(shrink(features_Bdhw - summed_Bdhw, grid)))

    def _nearest(self, rest_Bnd: torch.Tensor) -> torch.Tensor:
        codes_Vd, rest_Bnd = self.codebook.weight.float(), rest_Bnd.float()
        distance_BnV = rest_Bnd.square().sum(-1, keepdim=True) + codes_Vd.square().sum(-1) - 2 * rest_Bnd @ codes_Vd.T
        return distance_BnV.argmin(-1, keepdim=True).to(torch.int32)

    def addend(self, labels_Bns, schedule, k, dtype):
        return self._spread(self.codebook(labels_Bns[..., 0].long()), schedule, k).to(dtype)

    def _spread(self, codes_Bnd: torch.Tensor, schedule: Schedule, k: int) -> torch.Tensor:
        """Upsample and smooth the codes of scale ``k`` on the last grid: [B, d, h, w]."""
        spread = to_map(codes_Bnd, schedule[k])
        if schedule[k] != schedule[-1]:
            spread = F.interpolate(spread, size=schedule[-1], mode="bicubic")
        share = self.config.residual_share
        return (1 - share) * spread + share * self.residual[self.conv_of_scale[k]](spread)

    def inputs(self, summed_Bdhw, grid):
        return to_tokens(shrink(summed_Bdhw, grid))

    def training_state(self) -> dict[str, torch.Tensor]:
        return {"idle": self.idle}

    def load_training_state(self, state: dict[str, torch.Tensor]) -> None:
        self.idle = state["idle"]

    def features(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """Encode images float [B, 3, H, W] in [-1, 1] as raw latent features [B, d, H/16, W/16]."""
        return self.to_latent(self.encoder(images_B3HW))

    def encode(self, images_B3HW: torch.Tensor) -> Quantised:
        """Convert images to indices and decoder inputs."""
        return self.quantise(self.features(images_B3HW), self.schedule_for(*images_B3HW.shape[-2:]))

    def decode(self, summed_Bdhw: torch.Tensor) -> torch.Tensor:
        """Decode summed codes to images float [B, 3, H, W] in [-1, 1]."""
        return one_by_one(self.decoder, self.from_latent(summed_Bdhw)).clamp(-1, 1)

    def training_loss(self, images_B3HW: torch.Tensor, criterion: Criterion) -> torch.Tensor:
        """Return ``criterion`` of reconstructed and original images, plus the codebook and commitment losses.

        The latter are the mean squared distance between the running sum and the features, averaged over scales. The
        gradient of the images passes straight through to the features; codes and shared convolutions learn from the
        distance.
        """
        schedule = self.schedule_for(*images_B3HW.shape[-2:])
        features = self.features(images_B3HW)
        self._revive(features.detach(), schedule)
        summed = torch.zeros_like(features)
        distance: torch.Tensor | float = 0.0
        for k, grid in enumerate(schedule):
            labels = self.label(features.detach(), summed.detach(), grid)
            self.idle[labels.unique().long()] = 0
            summed = summed + self.addend(labels, schedule, k, features.dtype)
            distance = distance + F.mse_loss(summed, features.detach())
            distance = distance + COMMITMENT * F.mse_loss(summed.detach(), features)
        through = features + (summed - features).detach()
        reconstructed_B3HW = self.decoder(self.from_latent(through))
        return criterion(reconstructed_B3HW, images_B3HW) + distance / len(schedule)

    @torch.no_grad()
    def _revive(self, features_Bdhw: torch.Tensor, schedule: Schedule) -> None:
        """Re-initialise long unused codes at remainders of these images, at random scales."""
        if not len(self.idle):
            self.idle = torch.zeros(self.config.codes, dtype=torch.int64, device=features_Bdhw.device)
        self.idle += 1
        tired = (self.idle > PATIENCE).nonzero()[:, 0]
        if not len(tired):
            return
        rest, summed = [], torch.zeros_like(features_Bdhw)
        for k, grid in enumerate(schedule):
            left_Bnd = to_tokens(shrink(features_Bdhw - summed, grid))
            rest.append(left_Bnd.flatten(0, 1))
            summed = summed + self.addend(self._nearest(left_Bnd), schedule, k, features_Bdhw.dtype)
        scales = torch.randint(len(rest), (len(tired),)).tolist()
        fresh = [rest[k][int(torch.randint(len(rest[k]), ()))] for k in scales]
        self.codebook.weight[tired] = torch.stack(fresh)
        self.idle[tired] = 0
