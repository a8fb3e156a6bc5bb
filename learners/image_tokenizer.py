"""Image-tokenizer training: reconstruct images through their tokens.

A plain single-process loop for the tiny model and small collections; the released tokenizer is used unchanged.
Deviation from the release: no adversarial, perceptual or entropy term. Flat drawings need none (the bits do not
collapse without them), and each would require a pretrained network.

Shape legend: B batch, H W image.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from vargpt_rl.data.images import ImageSource
from vargpt_rl.model.families import AnyImageTokenizer


def reconstruction_loss(output_B3HW: torch.Tensor, target_B3HW: torch.Tensor) -> torch.Tensor:
    """Scalar L1 + L2, weighted towards pixels that differ from the image's median colour.

    Most of a drawing is background; without the weight its objects are learned last.
    """
    background_B31 = target_B3HW.flatten(2).median(dim=2, keepdim=True).values
    contrast_B1HW = (target_B3HW - background_B31[..., None]).abs().amax(1, keepdim=True)
    weight_B1HW = 1 + 4 * (contrast_B1HW / 0.4).clamp(max=1)
    error = output_B3HW - target_B3HW
    return (weight_B1HW * (error.abs() + error.square())).mean()


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100, decay: float = 0.3) -> float:
    """Warmup, plateau, then linear decay to zero over the last share ``decay`` of the steps."""
    remaining = (steps - step) / (decay * steps)
    return peak * min(1.0, (step + 1) / warmup, remaining)


def train_image_tokenizer(
    tokenizer: AnyImageTokenizer,
    batches: Iterator[torch.Tensor],
    steps: int,
    peak_lr: float,
    on_step: Callable[[int, float], None],
    first_step: int = 0,
) -> None:
    """Train in place on ``batches`` of images, float [B, 3, H, W] in [-1, 1]; ``on_step(step, loss)`` follows each."""
    tokenizer.train()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(first_step, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_lr)
        images_B3HW = next(batches)
        loss = tokenizer.training_loss(images_B3HW, reconstruction_loss)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        on_step(step, loss.item())
    tokenizer.eval()


def image_batches(
    source: ImageSource, keys: list[str], side: int, batch: int, seed: int
) -> tuple[Iterator[torch.Tensor], list[list[str]]]:
    """Endless random batches float [batch, 3, side, side] of a source's images, each batch mirrored half of the time.

    Also returns [key, reason] of each image that could not be loaded. ValueError if none could.
    """
    images, failures = [], []
    for key in keys:
        try:
            images.append(torch.from_numpy(np.asarray(source.load(key, side)).copy()).permute(2, 0, 1))
        except (ValueError, OSError) as error:
            failures.append([key, str(error)])
    if not images:
        raise ValueError(f"none of {len(keys)} images could be loaded; the first: {failures[0]}")
    pool, generator = torch.stack(images), torch.Generator().manual_seed(seed)

    def batches() -> Iterator[torch.Tensor]:
        while True:
            chosen = pool[torch.randint(len(pool), (batch,), generator=generator)]
            yield (chosen.flip(3) if torch.rand(1, generator=generator) < 0.5 else chosen).float() / 127.5 - 1

    return batches(), failures
