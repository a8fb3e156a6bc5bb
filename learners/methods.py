"""Alignment methods of an iteration, and what each online one learns from a group of images, and its loss.

A method is a row of `ONLINE`. The driver draws and judges groups of images of one prompt and asks ``choose`` which of
them to learn from, and how much; the trainer (`learners.grpo`) computes their log-probabilities and asks ``loss``.

Shape legend: N images, P parts of an image (one, or its coarse prefix and the rest).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch

from learners.config import RlConfig
from vargpt_rl.common.settings import OneOf
from vargpt_rl.losses.policy_gradient import (
    clipped_policy_loss,
    group_advantages,
    likelihood_loss,
    part_advantages,
    preference_loss,
)

Metrics = dict[str, torch.Tensor]
Choice = dict[int, tuple[float, ...]]
"""Images of a group to learn from, by their place in it, with the advantage of each part."""


@dataclass(frozen=True, kw_only=True)
class ScoredImages:
    """The images of a micro-batch, as a loss sees them.

    Log-probabilities [N, P] are means over the symbols of a part, weighted by credit: under the policy (with
    gradients), under the sampler, and under the reference. The last two are None unless the method or its settings ask
    for them.
    """

    log_prob: torch.Tensor
    advantage: torch.Tensor
    """[N, P]."""
    reward: torch.Tensor
    """[N], NaN for an image without one."""
    group: torch.Tensor
    """[N], the same number for images of one group."""
    terms: int
    """Symbols of the trained scales of an image."""
    sampler: torch.Tensor | None = None
    reference: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class OnlineMethod:
    """An online method. ``choose`` returns None for a group whose rewards tell nothing apart, which is replaced."""

    title: str
    """Name in tables."""
    choose: Callable[[Sequence[float | None], RlConfig], Choice | None]
    """Rewards of a group -> the images to learn from."""
    loss: Callable[[ScoredImages, RlConfig], tuple[torch.Tensor, Metrics]]
    """Loss [N, P], without the KL term that is added to every method's, and metrics of the same shape."""
    takes: frozenset[str] = field(default_factory=frozenset)
    """Log-probabilities that the loss takes besides the policy's: "sampler", "reference"."""
    completions: Callable[[RlConfig], int] = lambda settings: 1
    """Images of a group in a row that share their coarse prefix. Above 1, images have two parts."""
    compared: Callable[[RlConfig, int], int | None] = lambda settings, group: None
    """Settings and images drawn in a group -> number of its images that the loss compares, all in one micro-batch."""

    def split(self, settings: RlConfig) -> int | None:
        """Return the number of scales of the first of two parts; None if images are one part."""
        return settings.prefix_scales if self.completions(settings) > 1 else None


def choose_scored(rewards: Sequence[float | None], settings: RlConfig) -> Choice | None:
    """Choose all images with a reward, with their advantages."""
    advantages = group_advantages(rewards, settings.normalise)
    if advantages is None:
        return None
    return {i: (advantage,) for i, advantage in enumerate(advantages) if advantage is not None}


def choose_better(rewards: Sequence[float | None], settings: RlConfig) -> Choice | None:
    """Choose the images above their group's mean, all alike."""
    chosen = choose_scored(rewards, settings)
    return chosen and {i: (1.0,) for i, (advantage,) in chosen.items() if advantage > 0}


def choose_pairs(rewards: Sequence[float | None], settings: RlConfig) -> Choice | None:
    """Choose the best and the worst image, the first of equals, or the whole group, which always has the same size."""
    chosen = choose_scored(rewards, settings)
    if chosen is None:
        return None
    if settings.pairs == "all":
        return {i: chosen.get(i, (0.0,)) for i in range(len(rewards))}
    best, worst = max(chosen, key=chosen.__getitem__), min(chosen, key=chosen.__getitem__)
    return {best: chosen[best], worst: chosen[worst]}


def choose_parts(rewards: Sequence[float | None], settings: RlConfig) -> Choice | None:
    """Choose all images with a reward, with one advantage, or with those of prefix and rest."""
    if settings.completions == 1:
        return choose_scored(rewards, settings)
    advantages = part_advantages(rewards, settings.completions, settings.value_eta, settings.normalise)
    if advantages is None:
        return None
    return {i: both for i, both in enumerate(advantages) if both is not None}


def grpo_loss(images: ScoredImages, settings: RlConfig) -> tuple[torch.Tensor, Metrics]:
    """Clipped policy gradient, with a ratio for each part."""
    assert images.sampler is not None, "GRPO takes the sampler's log-probabilities"
    return clipped_policy_loss(images.log_prob, images.sampler, images.advantage, settings.clip)


def rft_loss(images: ScoredImages, settings: RlConfig) -> tuple[torch.Tensor, Metrics]:
    """Negative log-likelihood."""
    return likelihood_loss(images.log_prob, images.advantage), {}


def online_dpo_loss(images: ScoredImages, settings: RlConfig) -> tuple[torch.Tensor, Metrics]:
    """DPO on the pairs of each group; log-ratios are sums over the image, weighted by credit."""
    assert images.reference is not None, "online DPO takes the reference's log-probabilities"
    log_ratio_N = ((images.log_prob - images.reference) * images.terms)[:, 0]
    loss_N, metrics = preference_loss(log_ratio_N, images.reward, images.group, settings.beta)
    return loss_N[:, None], {name: values_N[:, None] for name, values_N in metrics.items()}


ONLINE = {
    "rft": OnlineMethod(title="RFT", choose=choose_better, loss=rft_loss),
    "online_dpo": OnlineMethod(
        title="online DPO",
        choose=choose_pairs,
        loss=online_dpo_loss,
        takes=frozenset({"reference"}),
        compared=lambda settings, group: 2 if settings.pairs == "best_worst" else group,
    ),
    "grpo": OnlineMethod(
        title="GRPO",
        choose=choose_parts,
        loss=grpo_loss,
        takes=frozenset({"sampler"}),
        completions=lambda settings: settings.completions,
    ),
}
"""Online methods by the names in ``align.methods``."""
METHODS = ("dpo", "reward", *ONLINE)
"""Alignment methods of an iteration."""


@dataclass
class AlignConfig:
    """Alignment of an iteration."""

    sft: bool = True
    """Begin with SFT. Without it, online methods start from the policy as it is; DPO samples from SFT's checkpoints."""
    methods: list[Annotated[str, OneOf(*METHODS)]] = field(default_factory=lambda: ["dpo"])
    """Methods, in the order in which they are applied, each from the policy of the last: dpo, reward, rft, online_dpo,
    grpo.

    dpo: on pairs of samples and winners, as in the paper. reward: leaves the policy as it is and learns a reward from
    the pairs, which the methods after it maximise instead of ``reward.path``. The others: online, on rewards of the
    policy's own images.
    """

    def __post_init__(self):
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"align.methods={self.methods}: expected some of {list(METHODS)}, each at most once")

    @property
    def online(self) -> list[str]:
        """The methods that draw and judge their own images."""
        return [method for method in self.methods if method in ONLINE]

    @property
    def learns_pairs(self) -> bool:
        """Tell whether a method learns from preference pairs."""
        return "dpo" in self.methods or "reward" in self.methods

    @property
    def unlearned(self) -> list[str]:
        """The online methods without a learned reward before them."""
        learned = self.methods.index("reward") if "reward" in self.methods else len(self.methods)
        return [method for method in self.online if self.methods.index(method) < learned]

    @property
    def last_moment(self) -> str:
        """Moment of the evaluation after the last method that changes the policy."""
        return f"after_{next((method for method in reversed(self.methods) if method != 'reward'), 'sft')}"

    @property
    def left_out(self) -> set[str]:
        """Rows of the stage table (``vargpt_rl.stages``) that an iteration leaves out."""
        return (set() if self.sft else {"sft"}) | (set() if "dpo" in self.methods else {"dpo", "sft_on_winners"})
