"""Policy gradients on images: pure functions of rewards and log-probabilities.

The log-probability of an image is here a weighted mean over its bits (in v1 over its indices), with the weights of
`vargpt_rl.losses.credit`. The ratio of policy and sampler is taken of this mean, one per image, as GSPO does
(arXiv 2507.18071): a product over thousands of bits would leave the clipping range at the first update.

Log-probabilities are those of the logits divided by the sampling temperature tau, the distribution that was drawn from
up to truncation. Truncation is not renormalised: top-p drops a bit's outcome below 1 - top_p, so that the other one had
probability 1 in the sampler and at least top_p here. With top_p 0.97 and tau 0.5 this decides 80 % of the tiny model's
bits at 128 px, which make 2 % of the log-probability and 3 % of its gradient. Guidance is left out, as in NextFlow-RL
(arXiv 2601.02256). Policy and sampler are scored the same way, so neither moves the ratio before the first update.

Shape legend: N images, G images of a prompt, K scales, P parts of an image (its coarse prefix, and the rest).
"""

import math
import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F

EQUAL = 1e-6
"""Rewards of a group that differ by no more than this count as equal."""


def group_advantages(rewards_G: Sequence[float | None], normalise: bool = True) -> list[float | None] | None:
    """Advantages of one prompt's images: reward minus the group's mean, divided by its standard deviation.

    None for an image without a reward (None). None instead of a list if the group carries no signal: fewer than two
    rewards, or all equal; the caller counts and refills these (DAPO, arXiv 2503.14476). The standard deviation is that
    of the group itself (divided by its size). ValueError for a reward that is not finite.
    """
    scored = [reward for reward in rewards_G if reward is not None]
    if bad := [reward for reward in scored if not math.isfinite(reward)]:
        raise ValueError(f"rewards of a group: {bad[0]}, expected finite numbers")
    if len(scored) < 2 or max(scored) - min(scored) <= EQUAL:
        return None
    mean = math.fsum(scored) / len(scored)
    spread = math.sqrt(math.fsum((reward - mean) ** 2 for reward in scored) / len(scored)) if normalise else 1.0
    return [None if reward is None else (reward - mean) / spread for reward in rewards_G]


def middle_return(rewards: Sequence[float], eta: float) -> float:
    """Value of a prefix from the rewards of its completions: eta log mean exp(reward / eta).

    The middle return of NextFlow-RL (arXiv 2601.02256): the mean for large eta, the largest reward for small eta.
    """
    top = max(rewards)
    return top + eta * math.log(math.fsum(math.exp((reward - top) / eta) for reward in rewards) / len(rewards))


def part_advantages(
    rewards_G: Sequence[float | None], completions: int, eta: float, normalise: bool = True
) -> list[tuple[float, float] | None] | None:
    """Advantages of the coarse prefix and of the rest of one prompt's images.

    Every ``completions`` images in a row share their prefix, of value V (`middle_return`). The prefix's advantage is
    V relative to the values of the group's prefixes, as in `group_advantages`; the advantage of the rest is the reward
    minus V, divided by the standard deviation of the group's rewards. None as in `group_advantages`.
    """
    if group_advantages(rewards_G) is None:
        return None
    groups = [rewards_G[at : at + completions] for at in range(0, len(rewards_G), completions)]
    scored = [[reward for reward in group if reward is not None] for group in groups]
    values = [middle_return(rewards, eta) if rewards else None for rewards in scored]
    coarse = group_advantages(values, normalise) or [0.0] * len(values)
    spread = statistics.pstdev(reward for rewards in scored for reward in rewards) if normalise else 1.0
    found: list[tuple[float, float] | None] = []
    for group, value, advantage in zip(groups, values, coarse, strict=True):
        for reward in group:
            if reward is None or value is None or advantage is None:
                found.append(None)
            else:
                found.append((advantage, (reward - value) / spread))
    return found


def clipped_policy_loss(
    log_prob_N: torch.Tensor, old_log_prob_N: torch.Tensor, advantage_N: torch.Tensor, clip: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped surrogate loss (PPO, arXiv 1707.06347, eq. 7) and metrics of each image [N], or of its parts [N, P].

    ``old_log_prob_N`` is the sampler's. Metrics: ``ratio``, and ``clipped``, 1 where the gradient is cut off.
    """
    ratio_N = (log_prob_N - old_log_prob_N).exp()
    plain_N = ratio_N * advantage_N
    clipped_N = ratio_N.clamp(1 - clip, 1 + clip) * advantage_N
    metrics = {"ratio": ratio_N.detach(), "clipped": (clipped_N < plain_N).detach().float()}
    return -torch.minimum(plain_N, clipped_N), metrics


def likelihood_loss(log_prob_N: torch.Tensor, advantage_N: torch.Tensor) -> torch.Tensor:
    """Weighted negative log-likelihood of each image [N]: rejection-sampling fine-tuning with advantages of 1."""
    return -log_prob_N * advantage_N


def kl_k3(log_prob_N: torch.Tensor, reference_log_prob_N: torch.Tensor) -> torch.Tensor:
    """Estimate of KL(policy || reference) from samples of the policy, never negative: r - 1 - ln r of r = ref / policy.

    The k3 estimator of http://joschu.net/blog/kl-approx.html, [N], here of the weighted mean per bit.
    """
    log_ratio_N = reference_log_prob_N - log_prob_N
    return log_ratio_N.exp() - 1 - log_ratio_N


def preference_loss(
    log_ratio_N: torch.Tensor, reward_N: torch.Tensor, group_N: torch.Tensor, beta: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """DPO's loss over all pairs of different reward within each group, and metrics ``margin`` and ``accuracy``: [N].

    -log sigmoid(beta (d_i - d_j)) for rewards r_i > r_j (arXiv 2305.18290, eq. 7), where d is the log-ratio of policy
    and reference in nats. It is averaged over a group's pairs; the mean over images is the mean over groups of equal
    size. Images with a reward of NaN are in no pair.
    """
    same_NN = group_N[:, None] == group_N
    better_NN = same_NN & (reward_N[:, None] > reward_N + EQUAL)
    pairs_N = (same_NN * better_NN.sum(1)).sum(1).clamp(min=1)
    weight_NN = better_NN * (same_NN.sum(1) / pairs_N)[:, None]
    margin_NN = beta * (log_ratio_N[:, None] - log_ratio_N)
    metrics = {
        "margin": (margin_NN.detach() * weight_NN).sum(1),
        "accuracy": ((margin_NN.detach() > 0) * weight_NN).sum(1),
    }
    return -(F.logsigmoid(margin_NN) * weight_NN).sum(1), metrics
