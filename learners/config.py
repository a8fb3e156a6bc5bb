"""Settings of the learners. No heavy imports, so that a bad setting fails at once."""

from dataclasses import dataclass, field
from typing import Annotated

from vargpt_rl.common.settings import (
    Between,
    Count,
    CountOrNone,
    LearningRate,
    Line,
    NotNegative,
    OneOf,
    Positive,
    Seconds,
    Share,
)

SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
"""Scheduler types of ``transformers`` that need no further arguments."""
OPTIMIZERS = {"adamw": None, "adamw_8bit": "adamw_bnb_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
"""Optimizers, by ``transformers``' names for those of bitsandbytes; None is its default, torch's AdamW."""
LOSS_TYPES = (
    "sigmoid",
    "sft",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
)
"""Loss types of TRL's DPO."""

UNDERSTANDING = ("language_model", "vision_tower", "vision_projector")
"""Parts of the understanding half."""


@dataclass
class Recipe:
    """Length and speed of a training stage. Global batch = micro_batch x accumulation x ranks."""

    steps: Count = 100
    """Optimizer steps."""
    batch: Count = 32
    """Examples (or pairs) per step, over all ranks."""
    micro_batch: Count = 8
    """Examples (or pairs) per forward pass of one rank."""
    lr: LearningRate = 5e-5
    """Peak learning rate of AdamW."""
    schedule: Annotated[str, OneOf(*SCHEDULES)] = "cosine"
    """Learning-rate schedule after warmup: a ``transformers`` scheduler type."""
    warmup_ratio: Share = 0.1
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: Share = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this total norm."""
    zero: Annotated[int, OneOf(0, 1, 2, 3)] = 2
    """DeepSpeed ZeRO stage."""
    gradient_checkpointing: CountOrNone = 0
    """Recompute activations in the backward pass to save memory: of no block (0), every block (1), or every n-th (n).

    Every second block needs about half of the memory between none and all, for half of the time.
    """
    optimizer: Annotated[str, OneOf(*OPTIMIZERS)] = "adamw"
    """AdamW with moments in fp32; ``adamw_8bit``: in 8 bits (arXiv 2110.02861, by bitsandbytes, on GPUs alone), 2 bytes
    a trained parameter instead of 8; ``paged_adamw_8bit``: these leave the GPU while its memory is short, until the
    stage is resumed."""
    offload: bool = False
    """Keep the optimizer's states, with ZeRO 2 or 3, in the machine's memory and update there: a GPU then holds neither
    moments nor fp32 copies nor gradients, 16 bytes a trained parameter, and each step waits for the CPU."""
    ema: Annotated[float, Between(0, 1, includes_low=False, includes_high=False)] | None = None
    """Decay of an exponential moving average of the trained tensors, which then is the stage's result: what samples
    after SFT, what the next stage starts from, what is evaluated and exported. Online methods draw with the trained
    weights themselves while they train. null averages nothing. Not with ZeRO 3."""

    def accumulation(self, ranks: int) -> int:
        """Micro-batches per step on each rank. ValueError unless the batch divides evenly."""
        if self.batch % (self.micro_batch * ranks):
            raise ValueError(
                f"batch={self.batch} with micro_batch={self.micro_batch} on {ranks} ranks: "
                f"expected a batch divisible by {self.micro_batch * ranks}"
            )
        return self.batch // (self.micro_batch * ranks)

    def check_options(self) -> None:
        """ValueError for settings that do not go together."""
        if self.offload and self.zero < 2:
            raise ValueError(f"offload=true with zero={self.zero}: expected zero 2 or 3")
        if self.offload and self.optimizer != "adamw":
            raise ValueError(f"offload=true with optimizer={self.optimizer}, which updates on the GPU: expected adamw")
        if self.ema is not None and self.zero == 3:
            raise ValueError(f"ema={self.ema:g} with zero=3, which splits the weights: expected zero 0, 1 or 2")

    def arithmetic(self, ranks: int) -> str:
        """The number of steps and the composition of a batch, in words."""
        parts = f"{self.micro_batch} (micro) x {self.accumulation(ranks)} (accumulation) x {ranks} (ranks)"
        return f"{self.steps} steps of {self.batch} = {parts}"


def _check_stored_states(block: str, stored: bool, frozen: list[str]) -> None:
    if stored and "language_inputs" not in frozen:
        raise ValueError(
            f"{block}.stored_states=true with {block}.frozen={frozen}: expected language_inputs among the frozen "
            "parts, or states change while training"
        )


@dataclass
class DpoConfig:
    """The preference loss."""

    beta: Positive = 0.1
    """Strength of the KL constraint. 0.1 is DPO's usual value; the VARGPT papers give none."""
    loss_type: list[Annotated[str, OneOf(*LOSS_TYPES)]] = field(default_factory=lambda: ["sigmoid"])
    """TRL's loss types; several are added."""
    loss_weights: list[NotNegative] | None = None
    """Weight of each loss; null weighs all by 1."""
    label_smoothing: Annotated[float, Between(0, 0.5, includes_high=False)] = 0.0
    """Assumed share of wrong labels, for the losses that use it."""
    logp_norm: Annotated[str, OneOf("sum", "per_token", "per_bit")] = "sum"
    """Normalisation of an image's log-probability: "sum", "per_token" or "per_bit".

    The papers sum over all bits. A sum has 4.8 times as many terms at 512 px as at 256, so the same beta is 4.8 times
    hotter there; "per_token" and "per_bit" divide by L or L x d and need a beta larger by that factor.
    """
    credit_alpha: NotNegative = 0.0
    """Weigh each token of a scale of h x w by (h w)^-alpha, normalised to mean 1; 0 weighs all alike, as the papers do.

    0.6 is the best value of NextFlow-RL (arXiv 2601.02256).
    """
    credit_scales: Count | None = None
    """Train this number of coarse scales alone; null trains all. 5 is up to 8 x 8."""
    frozen: list[Line] = field(default_factory=list)
    """Parts that stay as they are: of projector_in, projector_out, image_decoder, and ``language_inputs``, all that the
    language model reads of images (projector_in among it), so that it needs no backward pass."""
    stored_states: bool = False
    """Have the workers store the language model's states of each pair in the run directory, which they and the
    learners must share; learners then hold no language model. Needs ``language_inputs`` among ``frozen``.

    An image takes T x H numbers on disk until the training ends: 3.9 MB at 256 px in bf16 at the released size.
    """

    def __post_init__(self):
        _check_stored_states("dpo", self.stored_states, self.frozen)
        if not self.loss_type:
            raise ValueError("dpo.loss_type=[]: expected one or more")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(f"dpo.loss_weights={self.loss_weights}: expected one weight for each of {self.loss_type}")
        if self.loss_weights is not None and not any(self.loss_weights):
            raise ValueError(f"dpo.loss_weights={self.loss_weights}: expected one above 0, or nothing trains")


@dataclass
class RlConfig:
    """Online methods, on a model's own images."""

    clip: Annotated[float, Between(0, 1, includes_low=False, includes_high=False)] = 0.2
    """Ratios of policy and sampler are clipped to 1 - clip .. 1 + clip; no effect on the first update of a batch."""
    kl: NotNegative = 0.0
    """Weight of the KL divergence from the reference (k3 estimator); 0 needs no reference."""
    beta: Positive = 0.1
    """online_dpo: factor of the log-ratios of policy and reference, which are sums over the image."""
    pairs: Annotated[str, OneOf("best_worst", "all")] = "best_worst"
    """online_dpo: "best_worst" is one pair a group; "all" is every pair of different reward."""
    credit_alpha: NotNegative = 0.6
    """Weigh each token of a scale of h x w by (h w)^-alpha, normalised to mean 1; see `DpoConfig.credit_alpha`."""
    credit_scales: Count | None = None
    """Train this number of coarse scales alone; null trains all. 5 is up to 8 x 8."""
    completions: Count = 1
    """grpo: images drawn of each coarse prefix, whose value is then trained apart; 1 trains images as a whole.

    2 is the best of 1, 2 and 4 in NextFlow-RL (arXiv 2601.02256).
    """
    prefix_scales: Count = 3
    """grpo: coarse scales of a prefix with several completions. 3 is up to 4 x 4."""
    value_eta: Positive = 1.0
    """grpo: a prefix's value is eta log mean exp(reward / eta) of its completions."""
    updates: Count = 1
    """Optimizer steps on each batch of images."""
    normalise: bool = True
    """Divide advantages by the standard deviation of the group's rewards."""
    frozen: list[Line] = field(default_factory=list)
    """Parts that stay as they are: of projector_in, projector_out, image_decoder, and ``language_inputs``, all that the
    language model reads of images (projector_in among it), so that it needs no backward pass."""
    stored_states: bool = False
    """Have the workers store the language model's states of each batch's images in the run directory, which they and
    the learners must share; learners then hold no language model. Needs ``language_inputs`` among ``frozen``.

    Images take as much on disk as with `DpoConfig.stored_states`, those of all batches until the method ends.
    """

    def __post_init__(self):
        _check_stored_states("rl", self.stored_states, self.frozen)


@dataclass
class LearnedRewardConfig:
    """A reward learned from pairs."""

    trains: list[Annotated[str, OneOf(*UNDERSTANDING)]] = field(
        default_factory=lambda: ["language_model", "vision_tower"]
    )
    """Parts that train beside the head: language_model, vision_tower, vision_projector (a part of vision_tower)."""
    center: NotNegative = 0.01
    """Weight of the squared sum of a pair's rewards, which keeps rewards around 0 (arXiv 2312.09244)."""


@dataclass
class LearnerConfig:
    """The learner processes, their training checkpoints, and recovery from lost ranks."""

    ranks: Count = 2
    """Processes that share each batch."""
    gpus_per_rank: Positive = 1.0
    """GPUs reserved per rank, if the cluster has any."""
    peak_tflops: Positive | None = None
    """Peak of one rank's device in TFLOP/s, of which ``time/mfu`` is the share; null measures a matrix product."""
    start_timeout_s: Seconds = 300.0
    """Longest wait for the ranks' resources and for their start."""
    stall_timeout_s: Seconds = 1800.0
    """Longest wait without progress of a stage (a line in its log): then ranks or their data workers hang, and are
    restarted. It must cover loading the model, a step, and saving; three times the longest step is always allowed."""
    save_every: Count | None = 200
    """Steps between training checkpoints; null saves one only when a signal stops the run."""
    keep_last: Count = 2
    """Number of newest training checkpoints kept while a stage runs."""
    keep_every: Count | None = None
    """Keep the checkpoint of every ``keep_every``-th step for good; null keeps none."""
    max_restarts: CountOrNone = 3
    """Number of times per start of the run that lost ranks are restarted from the last training checkpoint."""

    def __post_init__(self):
        if self.keep_every is not None and (not self.save_every or self.keep_every % self.save_every):
            raise ValueError(
                f"learner.keep_every={self.keep_every}: expected null or a multiple of save_every={self.save_every}"
            )
