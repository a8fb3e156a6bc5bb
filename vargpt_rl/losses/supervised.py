"""Supervised losses and their metrics: pure functions of a batch and a model's output.

Deviations from the published code (specification, sections 4 and 9): the text loss covers the assistant's tokens only,
not prompts and padding. Scales are not reweighted by default; the published code never does it, although its
configuration says so.

Shape legend: B rows, T positions, V vocabulary, N drawn images, L image tokens, d bits or s symbols a token, D logits a
token, h w latent grid, K scales.
"""

from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F

from vargpt_rl.model.likelihood import scale_means, symbol_hits, symbol_log_probs
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.multiscale import Symbols
from vargpt_rl.model.prompt import IGNORED
from vargpt_rl.model.scales import STRIDE, Schedule
from vargpt_rl.model.unified import Drawing, Unified, VargptOutput

IMAGE_WEIGHT = Vargpt.image_weight
"""Weight of the image loss relative to the text loss in v1.1, as released; each family has its own."""


@dataclass(frozen=True)
class Noise:
    """Noise for supervised training; disabled everywhere else."""

    flip: float = 0.3
    """Upper bound of the bit-flip probability, drawn uniformly for each image and scale (bitwise self-correction; the
    published code draws it for each scale of a batch, in hundredths). No effect in v1, which has no bits."""
    condition_drop: float = 0.1
    """Probability that an image's condition is replaced by the unconditional one."""
    drop_path: float = 0.1
    """Stochastic depth of the last decoder block; in v1, of the last block of a 24-block decoder."""


def image_size_of(features_Ndhw: torch.Tensor) -> tuple[int, int]:
    """Return (height, width) in pixels of the images that latent features encode."""
    height, width = features_Ndhw.shape[-2:]
    return height * STRIDE, width * STRIDE


def noisy_drawing(features_Ndhw: torch.Tensor, noise: Noise, model: Unified) -> Drawing:
    """Make the drawing of encoded images under training noise, labels included."""
    tokenizer = model.image_tokenizer
    size = image_size_of(features_Ndhw)
    quantised = tokenizer.quantise_noisily(features_Ndhw.float(), tokenizer.schedule_for(*size), noise.flip)
    dropped_N = torch.rand(len(features_Ndhw), device=features_Ndhw.device) < noise.condition_drop
    return Drawing(quantised.inputs_BLd, size, dropped_N, noise.drop_path, quantised.labels_BLs)


def forward_batch(
    model: Unified, batch: dict[str, torch.Tensor], noise: Noise, text_logits: bool
) -> tuple[VargptOutput, torch.Tensor | None]:
    """Run a batch of ``SftCollator`` through the model; also return the image labels [N, L, s], if it has images."""
    keys = ("input_ids", "attention_mask", "blocks", "pixel_values", "image_grid_thw")
    inputs = {key: batch[key] for key in keys if key in batch}
    if "features" not in batch:
        return model(**inputs), None
    drawing = partial(noisy_drawing, batch["features"], noise)
    output = model(**inputs, drawing=drawing, text_logits=text_logits)
    return output, output.image_labels


def text_loss(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token cross entropy over the labelled tokens, in nats."""
    return F.cross_entropy(logits_BTV[:, :-1].float().flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORED)


def image_loss(
    logits_NLD: torch.Tensor, labels_NLs: torch.Tensor, weights_L: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the cross entropy of all image symbols, in nats: the mean, or weighted by token (weights sum to 1)."""
    log_probs_NLs = symbol_log_probs(logits_NLD, labels_NLs)
    if weights_L is None:
        return -log_probs_NLs.mean()
    return -(log_probs_NLs.mean((0, 2)) * weights_L).sum()


def scale_weights(schedule: Schedule) -> torch.Tensor:
    """Return token weights proportional to 1 / sqrt(area of the token's scale), fp32 [L], summing to 1 (Infinity).

    The published code computes but never applies them. They help a decoder that is trained from scratch: the prompt
    determines the coarse scales, which are a small part of the plain mean.
    """
    weights_L = torch.cat([torch.full((h * w,), (h * w) ** -0.5) for h, w in schedule])
    return weights_L / weights_L.sum()


def modality_losses(
    model: Unified, batch: dict[str, torch.Tensor], noise: Noise, text_weight: float, reweight: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Return ``text_weight`` x text loss and ``image_weight`` x image loss, if the batch has them, and metrics.

    The metrics are the unweighted losses, the numbers of labelled text tokens and image tokens, and the accuracy of
    bits or indices, overall and by scale. The text head is skipped when ``text_weight`` is 0. ``model`` may be a
    DeepSpeed engine, which forwards attribute access to its model.
    """
    output, labels_NLs = forward_batch(model, batch, noise, text_logits=text_weight > 0)
    losses, metrics = {}, {}
    if text_weight > 0:
        words = text_loss(output.logits, batch["labels"])
        losses["text"], metrics["loss/text"] = text_weight * words, words.item()
        metrics["tokens/text"] = int((batch["labels"][:, 1:] != IGNORED).sum())
    if labels_NLs is not None:
        logits_NLD = output.image_logits
        assert logits_NLD is not None  # every drawing has them
        schedule = model.image_tokenizer.schedule_for(*image_size_of(batch["features"]))
        image = image_loss(logits_NLD, labels_NLs, scale_weights(schedule) if reweight else None)
        losses["image"], metrics["loss/image"] = model.image_weight * image, image.item()
        metrics["tokens/image"] = labels_NLs.shape[0] * labels_NLs.shape[1]
        hits_NLs = symbol_hits(logits_NLD, labels_NLs).float()
        accuracy = f"{Symbols.of(logits_NLD, labels_NLs).name}_accuracy"
        metrics[accuracy] = hits_NLs.mean().item()
        by_scale = scale_means(hits_NLs, schedule).mean(0).tolist()
        metrics |= {f"{accuracy}/scale_{k}": hits for k, hits in enumerate(by_scale)}
    return losses, metrics


def sft_loss(
    model: Unified, batch: dict[str, torch.Tensor], noise: Noise, text_weight: float, reweight: bool = False
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the sum of `modality_losses`, and their metrics."""
    losses, metrics = modality_losses(model, batch, noise, text_weight, reweight)
    return cast(torch.Tensor, sum(losses.values())), metrics  # never 0: a batch has text or images
