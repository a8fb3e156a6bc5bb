"""Fréchet Inception distance between images of prompts and a reference, as clean-fid computes it ("clean" mode).

Images are scaled to 299 x 299 by Pillow's bicubic filter, channel by channel and without rounding. Features come from
the Inception network in TorchScript that clean-fid and StyleGAN use, ``inception-2015-12-05.pt``; its part "layers"
takes pixels from -1 to 1. The published packages cannot be used here: clean-fid 0.1.35 and torch-fidelity 0.4 import
torchvision, which does not load next to a CPU build of torch. This module needs torch, Pillow and SciPy.

``reference`` is a folder of images, which are squeezed into squares, or an .npz with "mu" and "sigma".

Shape legend: B images of a batch, N images, H W pixels, D features.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy import linalg

from vargpt_rl.common.errors import first_line
from vargpt_rl.data.records.formats import IMAGES
from vargpt_rl.evaluate.evaluated_model import EvaluatedModel
from vargpt_rl.evaluate.report import Column, Scores
from vargpt_rl.evaluate.scorers import batched, image_of_each, read_prompts
from vargpt_rl.evaluate.settings import EvaluateConfig
from vargpt_rl.inference.conversation import device_and_dtype

SIDE = 299
FEW = 10_000  # images; FID is biased upwards with fewer


class Statistics(NamedTuple):
    """Mean [D] and covariance [D, D] of the features, float64."""

    mu: np.ndarray
    sigma: np.ndarray


class FrechetDistance:
    """The benchmark: FID of one image per prompt against the reference."""

    columns = [Column("fid", "FID")]

    def __init__(self, config: EvaluateConfig):
        self.prompts, self.bad = read_prompts(config)
        if len(self.prompts) < 2:
            raise ValueError(f"prompts={config.prompts}: expected 2 prompts or more, got {len(self.prompts)}")
        self.requests = image_of_each(self.prompts)
        assert config.weights is not None and config.reference is not None  # `EvaluateConfig` requires both for fid
        self.device, _ = device_and_dtype(config.device, config.dtype)
        self.network = load_network(config.weights, self.device)
        self.reference = None if config.num_shards > 1 else self._reference(Path(config.reference))

    def _reference(self, path: Path) -> Statistics:
        if path.suffix == ".npz":
            return read_statistics(path)
        images = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGES) if path.is_dir() else []
        if len(images) < 2:
            raise ValueError(f"reference={path}: expected a folder of at least 2 images, or an .npz of statistics")
        return self.statistics(images, "reference")

    def statistics(self, paths: list[Path], label: str) -> Statistics:
        """Compute statistics of the images' features. ValueError if an image cannot be read."""
        features_ND = np.concatenate([features(self.network, images) for images in batched(paths, label)])
        return Statistics(features_ND.mean(axis=0), np.cov(features_ND, rowvar=False))

    def make(self, model: EvaluatedModel) -> None:
        model.draw(self.requests)

    def score(self, model: EvaluatedModel) -> Scores:
        assert self.reference is not None  # only shards lack it, and they score nothing
        drawn = self.statistics(model.paths(self.requests), model.name)
        counts = {"images": len(self.requests), "bad_prompts": self.bad}
        notes = [f"FID of {len(self.requests)} images: with fewer than about {FEW:,} it is biased upwards."]
        return Scores({"fid": distance(drawn, self.reference)}, counts=counts, notes=notes[len(self.requests) >= FEW :])


def load_network(path: str, device: torch.device) -> torch.jit.ScriptModule:
    """Load the Inception network's layers. ValueError if the file is something else."""
    if not Path(path).is_file():
        raise ValueError(f"weights={path}: no such file, expected the Inception network, inception-2015-12-05.pt")
    try:
        return torch.jit.load(path, map_location=device).eval().layers
    except (RuntimeError, AttributeError) as error:
        raise ValueError(
            f"weights={path}: expected a TorchScript network with a part 'layers': {first_line(error)}"
        ) from error


@torch.inference_mode()
def features(network: torch.jit.ScriptModule, images: list[Image.Image]) -> np.ndarray:
    """Compute features, float64 [B, D], of RGB images of any size."""
    pixels_BHW3 = torch.from_numpy(np.stack([resized(image) for image in images]))
    device = next(network.parameters()).device
    pixels_B3HW = ((pixels_BHW3 - 128) / 128).permute(0, 3, 1, 2).contiguous().to(device)
    return network(pixels_B3HW).flatten(1).double().cpu().numpy()


def resized(image: Image.Image) -> np.ndarray:
    """Resize to float32 [299, 299, 3] from 0 to 255, not rounded."""
    channels = [channel.convert("F").resize((SIDE, SIDE), Image.Resampling.BICUBIC) for channel in image.split()]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1).clip(0, 255)


def read_statistics(path: Path) -> Statistics:
    """Read an .npz file. ValueError unless it has a mean and a covariance of matching shapes."""
    try:
        with np.load(path) as file:
            found = Statistics(file["mu"].astype(np.float64), file["sigma"].astype(np.float64))
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f'reference={path}: expected arrays "mu" and "sigma": {error}') from error
    if found.mu.ndim != 1 or found.sigma.shape != 2 * found.mu.shape:
        raise ValueError(
            f'reference={path}: expected "mu" [D] and "sigma" [D, D], got {found.mu.shape} and {found.sigma.shape}'
        )
    return found


def distance(a: Statistics, b: Statistics) -> float:
    """Compute |mu_a - mu_b|^2 + tr(sigma_a + sigma_b - 2 (sigma_a sigma_b)^(1/2)). ValueError if sizes differ."""
    if a.mu.shape != b.mu.shape:
        raise ValueError(f"expected features of one size, got {len(a.mu)} and, in the reference, {len(b.mu)}")
    # The root of the product has the same trace as that of a symmetric matrix with real, non-negative eigenvalues.
    values, vectors = linalg.eigh(a.sigma)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(linalg.eigvalsh(root @ b.sigma @ root).clip(0)).sum()
    apart = a.mu - b.mu
    return float(apart @ apart + np.trace(a.sigma) + np.trace(b.sigma) - 2 * cross)
