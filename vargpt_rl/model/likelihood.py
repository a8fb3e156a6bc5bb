"""Log-likelihood of image tokens and statistics of it. Pure functions that reduce in fp32 or better.

Shape legend: N images, L image tokens, d bits or s symbols a token, D logits a token, V values a symbol, K scales.
"""

import torch
import torch.nn.functional as F

from vargpt_rl.model.multiscale import Symbols
from vargpt_rl.model.scales import Schedule, scale_slices

ROUNDING = {torch.float32: 5e-5, torch.bfloat16: 0.05, torch.float16: 0.006}
"""Nats by which the log-probability of one bit may differ under equal weights, through other kernels or batches.

Three to five times what was measured: 0.01 in bf16 between a pass and one in fp32 (10.6 B parameters, 256 px, an H200),
1.5e-5 in fp32 between batches of 1 and 4 (the embedded model, 256 px, a CPU).
"""


def log_prob_tolerance(dtype: torch.dtype, bits: float) -> float:
    """Largest difference in nats accepted between sums of log-probabilities over ``bits`` under equal weights.

    Rounding errors of bits are independent, so it grows with the root of their number. In a weighted sum a bit counts
    with the square of its weight.
    """
    return ROUNDING[dtype] * bits**0.5


def bit_log_probs(logits_NL2d: torch.Tensor, bits_NLd: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each bit, fp32 [N, L, d]: a two-way softmax over its pair of logits."""
    difference = logits_NL2d[..., 1::2].float() - logits_NL2d[..., 0::2].float()
    return F.logsigmoid(torch.where(bits_NLd.bool(), difference, -difference))


def image_log_probs(log_probs_NLd: torch.Tensor) -> torch.Tensor:
    """Sum over all bits of an image (16,672 at 256 px and d = 32): float64 [N].

    Double precision, since fp32 has a spacing of 1e-3 at about -1.5e4, coarser than the log-ratios to be compared.
    """
    return log_probs_NLd.sum((1, 2), dtype=torch.float64)


def scale_means(values_NLd: torch.Tensor, schedule: Schedule) -> torch.Tensor:
    """Average over the tokens and bits of each scale: [N, K]."""
    return torch.stack([values_NLd[:, at].mean((1, 2)) for at in scale_slices(schedule)], dim=1)


def scale_sums(values_NLd: torch.Tensor, schedule: Schedule) -> torch.Tensor:
    """Sum over the tokens and bits of each scale: float64 [N, K]."""
    sums = [values_NLd[:, at].sum((1, 2), dtype=torch.float64) for at in scale_slices(schedule)]
    return torch.stack(sums, dim=1)


def bit_entropy(logits_NL2d: torch.Tensor) -> torch.Tensor:
    """Return the entropy of each bit in nats: fp32 [N, L, d]."""
    difference = logits_NL2d[..., 1::2].float() - logits_NL2d[..., 0::2].float()
    p = torch.sigmoid(difference)
    return -(p * F.logsigmoid(difference) + (1 - p) * F.logsigmoid(-difference))


def bit_hits(logits_NL2d: torch.Tensor, bits_NLd: torch.Tensor) -> torch.Tensor:
    """Tell where the likelier value is the true bit: bool [N, L, d]."""
    return (logits_NL2d[..., 1::2] > logits_NL2d[..., 0::2]) == bits_NLd.bool()


def _by_symbol(logits_NLD: torch.Tensor, symbols: Symbols) -> torch.Tensor:
    """Return the log-probability of every value of every symbol: fp32 [N, L, s, V]."""
    return logits_NLD.unflatten(-1, tuple(symbols)).float().log_softmax(-1)


def symbol_log_probs(logits_NLD: torch.Tensor, labels_NLs: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each label, fp32 [N, L, s]: a softmax over its symbol's logits."""
    symbols = Symbols.of(logits_NLD, labels_NLs)
    if symbols.values == 2:
        return bit_log_probs(logits_NLD, labels_NLs)
    return _by_symbol(logits_NLD, symbols).gather(-1, labels_NLs[..., None].long())[..., 0]


def symbol_entropy(logits_NLD: torch.Tensor, symbols: Symbols) -> torch.Tensor:
    """Return the entropy of each symbol in nats: fp32 [N, L, s]."""
    if symbols.values == 2:
        return bit_entropy(logits_NLD)
    log_p = _by_symbol(logits_NLD, symbols)
    return -(log_p.exp() * log_p).sum(-1)


def symbol_hits(logits_NLD: torch.Tensor, labels_NLs: torch.Tensor) -> torch.Tensor:
    """Tell where the likeliest value is the label: bool [N, L, s]."""
    symbols = Symbols.of(logits_NLD, labels_NLs)
    if symbols.values == 2:
        return bit_hits(logits_NLD, labels_NLs)
    return logits_NLD.unflatten(-1, tuple(symbols)).argmax(-1) == labels_NLs
