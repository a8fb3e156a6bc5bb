"""Credit by scale: the weight of each image token in the log-probability that alignment trains.

The last scale of an image holds about half of its tokens but decides little of what is drawn; the coarse scales decide
the layout with a few tokens. NextFlow-RL (arXiv 2601.02256) weighs a token of a scale of h x w by (h w)^-alpha, with
alpha 0.6 the best of 0.6 to 1.2, and also trains a prefix of coarse scales alone.

Weights are normalised to mean 1 over the trained tokens. The sum of log-probabilities then keeps its size whatever
alpha is, and with it the meaning of DPO's beta; alpha 0 weighs every trained token by exactly 1, the papers' plain sum.

Shape legend: N images, L image tokens, K scales of the schedule, k trained scales, P parts (runs of scales).
"""

import torch

from vargpt_rl.model.scales import Schedule, token_count


def check_scales(schedule: Schedule, scales: int | None) -> None:
    """ValueError unless ``scales`` is None or a number of scales that the schedule has."""
    if scales is not None and not 1 <= scales <= len(schedule):
        raise ValueError(f"credit_scales={scales}: expected null or 1 to {len(schedule)}, the scales of {schedule}")


def scale_credit(schedule: Schedule, alpha: float, scales: int | None = None) -> torch.Tensor:
    """float64 [K]: weight of the tokens of each scale, (h w)^-alpha up to a factor.

    The weights have mean 1 over the tokens of the first ``scales`` scales (None: of all) and are 0 for finer scales.
    ValueError for a negative alpha or a number of scales that the schedule does not have.
    """
    check_scales(schedule, scales)
    if alpha < 0:
        raise ValueError(f"credit_alpha={alpha}: expected 0 or more")
    areas_K = torch.tensor([h * w for h, w in schedule], dtype=torch.float64)
    weights_K = areas_K**-alpha
    weights_K[len(schedule[:scales]) :] = 0
    return weights_K * token_count(schedule[:scales]) / (weights_K * areas_K).sum()


def token_credit(schedule: Schedule, alpha: float, scales: int | None = None) -> torch.Tensor:
    """float64 [L]: `scale_credit` of each token's scale, for the tokens of all scales."""
    areas = torch.tensor([h * w for h, w in schedule])
    return scale_credit(schedule, alpha, scales).repeat_interleave(areas)


def weighted_sum(values_NK: torch.Tensor, weights_K: torch.Tensor) -> torch.Tensor:
    """float64 [N]: sums by scale, such as log-probabilities, weighted and added up.

    ``values_NK`` may lack the finer scales, whose weights are then left out.
    """
    scales = values_NK.shape[1]
    return (values_NK.double() * weights_K[:scales].to(values_NK.device)).sum(1)


def summed_tokens(schedule: Schedule, credit_K: torch.Tensor) -> float:
    """Return how many tokens of weight 1 have a sum with the variance of the weighted one."""
    areas_K = torch.tensor([h * w for h, w in schedule], dtype=torch.float64)
    return (areas_K * credit_K**2).sum().item()


def part_means(schedule: Schedule, credit_K: torch.Tensor, symbols: int, split: int | None) -> tuple[torch.Tensor, ...]:
    """float64 [P, K] and [P]: weights that turn sums by scale into each part's mean, and each part's share of credit.

    The parts are the first ``split`` scales and the others; with None, a single part of all. ``symbols`` counts those
    of a token.
    """
    areas_K = torch.tensor([h * w for h, w in schedule], dtype=torch.float64)
    part_PK = torch.ones(1, len(schedule), dtype=torch.float64)
    if split is not None:
        coarse_K = (torch.arange(len(schedule)) < split).double()
        part_PK = torch.stack([coarse_K, 1 - coarse_K])
    weight_PK = part_PK * credit_K
    credit_P = (weight_PK * areas_K).sum(1)
    return weight_PK / (symbols * credit_P[:, None]), credit_P / credit_P.sum()
