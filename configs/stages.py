"""Settings of the stages: the blocks of ``LoopConfig`` that the rows of ``vargpt_rl.stages`` name."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Annotated

from learners.config import DpoConfig, LearnedRewardConfig, Recipe, RlConfig
from vargpt_rl.common.settings import (
    Between,
    Count,
    CountOrNone,
    LearningRate,
    Line,
    NotNegative,
    OneOf,
    Share,
    at_least,
)


@dataclass
class TokenizerStage:
    """Image-tokenizer training, for images that the starting checkpoint's tokenizer does not know."""

    steps: Count = 400
    """Optimizer steps."""
    batch: Count = 8
    """Images per step."""
    lr: LearningRate = 1e-3
    """Peak learning rate."""
    images: Count = 600
    """Training images of the data source, to which their winners are added."""


@dataclass
class SupervisedStage:
    """A supervised stage outside the iterations. With data=records, the recipe alone says how much is read."""

    records: Count = 256
    """Training images of the data source."""
    questions: CountOrNone = 0
    """Questions about images, for a stage that learns from them."""
    drawing_share: Share = 1.0
    """Share of drawings in each micro-batch; the rest are questions."""
    recipe: Recipe = field(default_factory=Recipe)


def pretrain_defaults() -> SupervisedStage:
    """Default of ``pretrain``: only the two generation projectors train, on drawings."""
    return SupervisedStage(records=256, recipe=Recipe(steps=20, batch=16, micro_batch=8, lr=2e-4))


def understanding_defaults() -> SupervisedStage:
    """Default of ``understanding``: the language model and the vision projector train, on questions and drawings."""
    recipe = Recipe(steps=24, batch=32, micro_batch=16, lr=2e-4)
    return SupervisedStage(records=256, questions=1024, drawing_share=0.25, recipe=recipe)


def edit_defaults() -> SupervisedStage:
    """Default of ``edit``: all but the image tokenizer trains, on edits, at the last of ``resolutions``.

    The paper too edits at its highest resolution.
    """
    return SupervisedStage(records=512, recipe=Recipe(steps=60, batch=16, micro_batch=4, lr=2e-4))


@dataclass
class SftStage:
    """The visual decoder and both projectors train, on drawings, at the iteration's resolution."""

    records: Count = 2048
    """Training images of the data source."""
    checkpoints: list[Annotated[float, Between(0, 1, includes_low=False)]] = field(default_factory=lambda: [0.5])
    """Fractions of the stage after which weights are kept as samplers of rejected images, beside the final ones.

    The paper says only "different SFT checkpoints and the fully SFT-trained model".
    """
    shares: list[Share] = field(default_factory=list)
    """Share of the samples that each of ``checkpoints`` draws, the final model the rest; empty for equal shares."""
    frozen: list[Line] = field(default_factory=list)
    """Parts that stay as they are, for ablations: as `DpoConfig.frozen`."""
    recipe: Recipe = field(default_factory=lambda: Recipe(steps=40, batch=32, micro_batch=16, lr=1e-4))

    def __post_init__(self):
        if self.shares and len(self.shares) != len(self.checkpoints):
            raise ValueError(f"sft.shares={self.shares}: expected one for each of sft.checkpoints={self.checkpoints}")
        if sum(self.shares) > 1 + 1e-9:
            raise ValueError(f"sft.shares={self.shares}: expected at most 1 in all")

    def samplers(self) -> dict[int, float]:
        """Return the steps whose weights sample rejected images, the last included, each with its share."""
        given = [*self.shares, max(0.0, 1 - sum(self.shares))] if self.shares else [1] * (len(self.checkpoints) + 1)
        shares: dict[int, float] = defaultdict(float)
        for fraction, share in zip([*self.checkpoints, 1.0], given, strict=True):
            shares[max(1, round(fraction * self.recipe.steps))] += share / sum(given)
        return dict(sorted(shares.items()))

    def saved_steps(self) -> tuple[int, ...]:
        """Return the steps of `samplers` before the last: weights are saved after each."""
        return tuple(step for step in self.samplers() if step < self.recipe.steps)


@dataclass
class GuardConfig:
    """Guards of online methods. A loss or gradient that is not finite always stops them.

    If training is stopped for a divergence, the weights before it are kept; with ``validate_every`` the best ones.
    """

    max_ratio: Annotated[float, at_least(1)] = 2.0
    """Stop if the ratio of policy and sampler of any image exceeds this. It is a mean over bits, hence near 1."""
    max_kl: NotNegative = 0.1
    """Stop if the KL divergence from the reference exceeds this many nats a symbol (only with ``rl.kl``)."""
    min_entropy: NotNegative = 0.1
    """Stop if the policy's entropy falls below this share of that at the first step."""
    min_diversity: NotNegative = 0.5
    """Warn if the diversity of a prompt's images falls below this share of the first update's."""
    validate_every: Count | None = None
    """Batches between two validations on held-out prompts other than the evaluation's; null makes none.

    The score is that of the evaluation. The weights with the highest one are the method's result.
    """
    prompts: Count = 60
    """Held-out prompts of a validation."""


@dataclass
class RlStage(RlConfig):
    """Online methods: GRPO, DPO on own images, or rejection-sampling fine-tuning on the better images of each group.

    The defaults are the demo's. Large models need a smaller rate: 5e-5 broke StyleVAR within 80 updates, 1e-5 did not.
    """

    prompts: Count = 8
    """Groups of an update: prompts whose images have different rewards."""
    group: Annotated[int, at_least(2)] = 8
    """Images drawn of each prompt."""
    refills: CountOrNone = 2
    """Times that groups of equal reward are replaced by other prompts' before an update makes do with fewer."""
    staleness: Annotated[int, OneOf(0, 1)] = 0
    """1 draws the next batch while the learner trains on this one, with weights one update old; 0 waits."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    recipe: Recipe = field(
        default_factory=lambda: Recipe(steps=4, batch=64, micro_batch=8, lr=2e-4, schedule="constant", warmup_ratio=0.0)
    )


@dataclass
class RewardStage(LearnedRewardConfig):
    """A reward learned from preference pairs, on the understanding half of the iteration's policy."""

    table: Line | None = None
    """Preference table to learn from; null is the iteration's own, which is made if ``dpo`` has not made it."""
    held_out: Annotated[float, Between(0, 1, includes_low=False, includes_high=False)] = 0.2
    """Share of the prompts whose pairs only measure the reward."""
    recipe: Recipe = field(default_factory=lambda: Recipe(steps=300, batch=16, micro_batch=8, lr=5e-4))


@dataclass
class DpoStage(DpoConfig):
    """DPO on the pairs of the iteration.

    The learning rate is low on purpose: with external winners, ten times as much drives pair accuracy to 1 while
    images get worse. An SFT anchor (``loss_type=[sigmoid,sft]``) is the other remedy.
    """

    control: bool = True
    """Also train SFT on the winners, for as many steps, to compare."""
    min_pairs: Count | None = None
    """Start DPO with this many pairs while the workers make the rest, in rounds of as many prompts.

    null waits for all pairs. Only if workers and ranks do not share GPUs.
    """
    recipe: Recipe = field(default_factory=lambda: Recipe(steps=20, batch=16, micro_batch=4, lr=2e-5))
