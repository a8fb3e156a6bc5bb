"""Image-tokenizer training: reconstruct images through their tokens.

A plain single-process loop for the tiny model and small collections; the released tokenizer is used unchanged.
Deviation from the release: no adversarial, perceptual or entropy term. Flat drawings need none (the bits do not
collapse without them), and each would require a pretrained network.

Shape legend: B batch, H W image.
"""

from collections.abc import Callable, Iterator, Mapping

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


class TokenizerTraining:
    """Training of ``tokenizer`` in place on ``batches`` of images, float [B, 3, H, W] in [-1, 1]."""

    def __init__(self, tokenizer: AnyImageTokenizer, batches: Iterator[torch.Tensor], steps: int, peak_lr: float):
        self.tokenizer = tokenizer
        self.batches = batches
        self.steps = steps
        self.peak_lr = peak_lr
        self.optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.losses: list[float] = []

    def run(self, on_step: Callable[[int, float], None]) -> None:
        """Train to the last step; ``on_step(steps done, loss)`` follows each.

        Raises ValueError at a step whose gradient is not finite. Without training, features are weaker than codes, and
        each scale undoes the one before: after an even number of scales the decoder sees zeros, and each of its group
        norms multiplies the gradient by a thousand.
        """
        self.tokenizer.train()
        for step in range(len(self.losses), self.steps):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(step, self.steps, self.peak_lr)
            loss = self.tokenizer.training_loss(next(self.batches), reconstruction_loss)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if not torch.nn.utils.clip_grad_norm_(self.tokenizer.parameters(), 1.0).isfinite():
                raise ValueError(
                    f"step {step + 1}: the gradient of the image tokenizer is not finite, as if the codes of all its "
                    "scales added up to nothing: expected trained weights, or a resolution with an odd number of scales"
                )
            self.optimizer.step()
            self.losses.append(loss.item())
            on_step(step + 1, self.losses[-1])
        self.tokenizer.eval()

    def state(self) -> dict[str, torch.Tensor]:
        """Return all that the next steps depend on but for the batches: weights, moments, losses, random state."""
        moments = self.optimizer.state_dict()["state"]
        return {
            **{f"weights/{name}": tensor for name, tensor in self.tokenizer.state_dict().items()},
            **{f"unsaved/{name}": tensor for name, tensor in self.tokenizer.training_state().items()},
            **{f"optimizer/{i}/{key}": tensor for i, own in moments.items() for key, tensor in own.items()},
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "random": torch.get_rng_state(),
        }

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go back to a `state`."""

        def below(prefix: str) -> dict[str, torch.Tensor]:
            # Copies have the usual alignment, on which rounding depends; those of a mapped file have not.
            return {name.removeprefix(prefix): own.clone() for name, own in state.items() if name.startswith(prefix)}

        self.tokenizer.load_state_dict(below("weights/"))
        self.tokenizer.load_training_state(below("unsaved/"))
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in below("optimizer/").items():
            index, key = name.split("/")
            moments.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        self.losses = state["losses"].tolist()
        torch.set_rng_state(state["random"])


class ImageBatches:
    """Endless random batches float [batch, 3, side, side] of a source's images, each batch mirrored half of the time.

    ``failures`` has [key, reason] of each image that could not be loaded. ValueError if none could.
    """

    def __init__(self, source: ImageSource, keys: list[str], side: int, batch: int, seed: int):
        images = []
        self.failures: list[list[str]] = []
        for key in keys:
            try:
                images.append(torch.from_numpy(np.asarray(source.load(key, side)).copy()).permute(2, 0, 1))
            except (ValueError, OSError) as error:
                self.failures.append([key, str(error)])
        if not images:
            raise ValueError(f"none of {len(keys)} images could be loaded; the first: {self.failures[0]}")
        self.pool = torch.stack(images)
        self.batch = batch
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> "ImageBatches":
        return self

    def __next__(self) -> torch.Tensor:
        chosen = self.pool[torch.randint(len(self.pool), (self.batch,), generator=self.generator)]
        mirrored = torch.rand(1, generator=self.generator) < 0.5
        return (chosen.flip(3) if mirrored else chosen).float() / 127.5 - 1
