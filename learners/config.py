"""Settings of the learners. No heavy imports, so that a bad setting is told at once."""

from dataclasses import dataclass, field


@dataclass
class Recipe:
    """How long and how fast a stage trains. Global batch = micro_batch x accumulation x ranks."""

    steps: int = 100
    batch: int = 32
    micro_batch: int = 8
    lr: float = 5e-5
    schedule: str = "cosine"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    zero: int = 2
    gradient_checkpointing: bool = False

    def accumulation(self, ranks: int) -> int:
        """Micro-batches a step on each rank. ValueError unless the batch divides evenly."""
        if self.steps < 1 or self.batch % (self.micro_batch * ranks):
            raise ValueError(
                f"batch={self.batch} with micro_batch={self.micro_batch} on {ranks} ranks and steps={self.steps}: "
                f"expected steps of 1 or more and a batch divisible by {self.micro_batch * ranks}"
            )
        return self.batch // (self.micro_batch * ranks)

    def arithmetic(self, ranks: int) -> str:
        """Steps and how a step's batch is made up, in words."""
        parts = f"{self.micro_batch} (micro) x {self.accumulation(ranks)} (accumulation) x {ranks} (ranks)"
        return f"{self.steps} steps of {self.batch} = {parts}"


@dataclass
class DpoConfig:
    """The preference loss. ``loss_type`` and ``loss_weights`` are TRL's, and may name several losses.

    ``beta`` 0.1 is DPO's usual one, the papers give none. ``logp_norm``: the papers sum log-probabilities over all bits
    ("sum"). A sum has 4.8 times as many terms at 512 px as at 256, so the same beta is 4.8 times hotter there;
    "per_token" and "per_bit" divide by L or L x d and want a beta larger by as much.
    """

    beta: float = 0.1
    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])
    loss_weights: list[float] | None = None
    label_smoothing: float = 0.0
    logp_norm: str = "sum"

    def __post_init__(self):
        if self.beta <= 0:
            raise ValueError(f"dpo.beta={self.beta}: expected a number above 0")
        if self.logp_norm not in ("sum", "per_token", "per_bit"):
            raise ValueError(f"dpo.logp_norm={self.logp_norm}: expected sum, per_token or per_bit")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(f"dpo.loss_weights={self.loss_weights}: expected one weight for each of {self.loss_type}")


@dataclass
class LearnerConfig:
    """``ranks`` processes share each stage's batch; ``gpus_per_rank`` counts where there are GPUs.

    ``save_every``: after so many steps a stage can be resumed from there, as also from where a signal stopped the run;
    null only from there. Of these checkpoints the ``keep_last`` last stay until the stage is done, and those after each
    ``keep_every`` steps for good. Ranks that are lost are started again, and go on from the last one, at most
    ``max_restarts`` times in one start of a run.
    """

    ranks: int = 2
    gpus_per_rank: float = 1.0
    bf16: bool = False
    start_timeout_s: float = 300.0
    save_every: int | None = 200
    keep_last: int = 2
    keep_every: int | None = None
    max_restarts: int = 3

    def __post_init__(self):
        if self.save_every is not None and self.save_every < 1:
            raise ValueError(f"learner.save_every={self.save_every}: expected 1 or more, or null")
        if self.keep_last < 1:
            raise ValueError(f"learner.keep_last={self.keep_last}: expected 1 or more")
        if self.keep_every is not None and (not self.save_every or self.keep_every % self.save_every):
            raise ValueError(
                f"learner.keep_every={self.keep_every}: expected null or a multiple of save_every={self.save_every}"
            )
        if self.max_restarts < 0:
            raise ValueError(f"learner.max_restarts={self.max_restarts}: expected 0 or more")
