"""The supervised losses and what is measured beside them: pure functions of a batch and a model's output.

Deviations from the published code (specification, sections 4 and 9): text is learned on the assistant's tokens alone,
not on prompts and padding; scales are not reweighted there either, although its configuration says so.

Shape legend: B rows, T positions, N drawings, L image tokens, d bits a token, K scales.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vargpt_rl.model.bits import Quantised, quantise
from vargpt_rl.model.likelihood import bit_hits, scale_means, symbol_log_probs
from vargpt_rl.model.modeling import Drawing, Vargpt, VargptOutput
from vargpt_rl.model.prompt import IGNORED
from vargpt_rl.model.scales import STRIDE, Schedule, schedule_for

IMAGE_WEIGHT = 3.0
"""Weight of the image loss beside the text loss (the release's)."""


@dataclass(frozen=True)
class Noise:
    """What makes supervised training robust; all off outside it.

    ``flip``: upper bound of the bit-flip probability, drawn uniformly for each picture and scale (bitwise
    self-correction; the published code draws it for each scale of a batch, in hundredths).
    ``condition_drop``: probability that a picture's condition is replaced by the unconditional one.
    ``drop_path``: stochastic depth of the last decoder block.
    """

    flip: float = 0.3
    condition_drop: float = 0.1
    drop_path: float = 0.1


def quantise_noisily(features_Bdhw: torch.Tensor, noise: Noise) -> Quantised:
    """Features -> bits, with inputs that carry the flips of bitwise self-correction."""
    schedule = schedule_for(*(side * STRIDE for side in features_Bdhw.shape[-2:]))
    rates = (len(features_Bdhw), len(schedule))
    flip_NK = torch.rand(rates, device=features_Bdhw.device) * noise.flip if noise.flip else None
    return quantise(features_Bdhw.float(), schedule, flip_NK)


def forward_batch(
    model: Vargpt, batch: dict[str, torch.Tensor], noise: Noise, text_logits: bool
) -> tuple[VargptOutput, torch.Tensor | None]:
    """Run a batch of ``SftCollator`` through the model; also returns the bits uint8 [N, L, d] it was asked for."""
    keys = ("input_ids", "attention_mask", "blocks", "pixel_values", "image_grid_thw")
    inputs = {key: batch[key] for key in keys if key in batch}
    if "features" not in batch:
        return model(**inputs), None
    features = batch["features"]
    quantised = quantise_noisily(features, noise)
    dropped_N = torch.rand(len(features), device=features.device) < noise.condition_drop
    size = tuple(side * STRIDE for side in features.shape[-2:])
    drawing = Drawing(quantised.inputs_BLd, size, dropped_N, noise.drop_path)
    return model(**inputs, drawing=drawing, text_logits=text_logits), quantised.bits_BLd


def text_loss(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross entropy over the labelled tokens, in nats."""
    return F.cross_entropy(logits_BTV[:, :-1].float().flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORED)


def image_loss(
    logits_NL2d: torch.Tensor, bits_NLd: torch.Tensor, weights_L: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross entropy of the symbols of all drawings, in nats: the mean, or weighted by token (weights sum to 1)."""
    log_probs_NLd = symbol_log_probs(logits_NL2d, bits_NLd)
    if weights_L is None:
        return -log_probs_NLd.mean()
    return -(log_probs_NLd.mean((0, 2)) * weights_L).sum()


def scale_weights(schedule: Schedule) -> torch.Tensor:
    """fp32 [L]: token weights proportional to 1 / sqrt(area of the token's scale), summing to 1 (Infinity).

    The published code computes them and never applies them. They help where a decoder learns from nothing: the prompt
    decides the coarse scales, which are a small part of the plain mean.
    """
    weights_L = torch.cat([torch.full((h * w,), (h * w) ** -0.5) for h, w in schedule])
    return weights_L / weights_L.sum()


def modality_losses(
    model: Vargpt, batch: dict[str, torch.Tensor], noise: Noise, text_weight: float, reweight: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """``text_weight`` x text and 3 x image, each where the batch has it; and metrics.

    The metrics are the losses without weights, the numbers of labelled text tokens and of image tokens, and bit
    accuracy, also by scale. The text head is not run when ``text_weight`` is 0.
    """
    output, bits_NLd = forward_batch(model, batch, noise, text_logits=text_weight > 0)
    losses, metrics = {}, {}
    if text_weight > 0:
        words = text_loss(output.logits, batch["labels"])
        losses["text"], metrics["loss/text"] = text_weight * words, words.item()
        metrics["tokens/text"] = int((batch["labels"][:, 1:] != IGNORED).sum())
    if bits_NLd is not None:
        schedule = schedule_for(*(side * STRIDE for side in batch["features"].shape[-2:]))
        picture = image_loss(output.image_logits, bits_NLd, scale_weights(schedule) if reweight else None)
        losses["image"], metrics["loss/image"] = IMAGE_WEIGHT * picture, picture.item()
        metrics["tokens/image"] = bits_NLd.shape[0] * bits_NLd.shape[1]
        hits_K = scale_means(bit_hits(output.image_logits, bits_NLd).float(), schedule).mean(0)
        metrics["bit_accuracy"] = bit_hits(output.image_logits, bits_NLd).float().mean().item()
        metrics |= {f"bit_accuracy/scale_{k}": hit for k, hit in enumerate(hits_K.tolist())}
    return losses, metrics


def sft_loss(
    model: Vargpt, batch: dict[str, torch.Tensor], noise: Noise, text_weight: float, reweight: bool = False
) -> tuple[torch.Tensor, dict[str, float]]:
    """The sum of `modality_losses`, and their metrics."""
    losses, metrics = modality_losses(model, batch, noise, text_weight, reweight)
    return sum(losses.values()), metrics
