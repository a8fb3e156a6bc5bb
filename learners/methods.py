"""Online alignment methods: what each learns from a group of images, and its loss.

A method is a row of `ONLINE`. The driver draws and judges groups of images of one prompt and asks ``choose`` which of
them to learn from, and how much; the trainer (`learners.grpo`) computes their log-probabilities and asks ``loss``.

Shape legend: N images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from learners.config import RlConfig
from vargpt_rl.losses.policy_gradient import clipped_policy_loss, group_advantages, likelihood_loss


@dataclass(frozen=True, kw_only=True)
class ScoredImages:
    """What a loss sees of the images of a micro-batch, each [N].

    Log-probabilities are means over the image's symbols, weighted by credit: under the policy (with gradients), under
    the sampler, and under the reference. The last two are None unless the method or its settings ask for them.
    """

    log_prob: torch.Tensor
    advantage: torch.Tensor
    sampler: torch.Tensor | None = None
    reference: torch.Tensor | None = None


Metrics = dict[str, torch.Tensor]
Choice = dict[int, float]
"""Images of a group to learn from, by their place in it, with their advantages."""


@dataclass(frozen=True, kw_only=True)
class OnlineMethod:
    """An online method. ``choose`` returns None for a group whose rewards tell nothing apart, which is replaced."""

    title: str
    """Name in tables."""
    choose: Callable[[Sequence[float | None], RlConfig], Choice | None]
    """Rewards of a group -> the images to learn from."""
    loss: Callable[[ScoredImages, RlConfig], tuple[torch.Tensor, Metrics]]
    """Loss [N], without the KL term that is added to every method's, and metrics [N]."""
    takes: frozenset[str] = field(default_factory=frozenset)
    """Log-probabilities that the loss takes besides the policy's: "sampler", "reference"."""


def choose_scored(rewards: Sequence[float | None], settings: RlConfig) -> Choice | None:
    """Choose all images with a reward, with their advantages."""
    advantages = group_advantages(rewards, settings.normalise)
    if advantages is None:
        return None
    return {i: advantage for i, advantage in enumerate(advantages) if advantage is not None}


def choose_better(rewards: Sequence[float | None], settings: RlConfig) -> Choice | None:
    """Choose the images above their group's mean, all alike."""
    chosen = choose_scored(rewards, settings)
    return chosen and {i: 1.0 for i, advantage in chosen.items() if advantage > 0}


def grpo_loss(images: ScoredImages, settings: RlConfig) -> tuple[torch.Tensor, Metrics]:
    """Clipped policy gradient."""
    assert images.sampler is not None, "GRPO takes the sampler's log-probabilities"
    return clipped_policy_loss(images.log_prob, images.sampler, images.advantage, settings.clip)


def rft_loss(images: ScoredImages, settings: RlConfig) -> tuple[torch.Tensor, Metrics]:
    """Negative log-likelihood."""
    return likelihood_loss(images.log_prob, images.advantage), {}


ONLINE = {
    "rft": OnlineMethod(title="RFT", choose=choose_better, loss=rft_loss),
    "grpo": OnlineMethod(
        title="GRPO",
        choose=choose_scored,
        loss=grpo_loss,
        takes=frozenset({"sampler"}),
    ),
}
"""Online methods by the names in ``align.methods``."""
