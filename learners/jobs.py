"""Jobs of a learner group. Imports no trainer and no DeepSpeed, since the driver makes these."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from learners.checkpoints import Layout, read_layout
from learners.config import DpoConfig, LearnedRewardConfig, Recipe, RlConfig
from vargpt_rl.data.images import ImageSource
from vargpt_rl.data.records.stream import RecordStream
from vargpt_rl.data.samples import Probe
from vargpt_rl.storage.checkpoint import Policy


class RankProcess(NamedTuple):
    """The process of a rank: its id, Ray's id of its node, and when it began (seconds since the epoch)."""

    pid: int
    node: str
    began: float


def training_checkpoints(output: Path) -> Path:
    """Folder of a job's training checkpoints, kept until the driver has recorded the job's result."""
    return output / "trainer"


def save_request(output: Path) -> Path:
    """File whose presence asks a job to save a training checkpoint after its current step."""
    return output / "save"


@dataclass(frozen=True, kw_only=True)
class SftJob:
    """A supervised stage on the records of ``stream``."""

    kind: ClassVar[str] = "sft"
    stage: str
    start: Policy
    stream: RecordStream
    recipe: Recipe
    output: Path
    seed: int
    probe: Probe
    """Image whose log-probability under the trained weights is returned."""
    save_steps: tuple[int, ...] = ()
    """Steps after which intermediate weights are saved as ``output/step-NNNNNN``."""
    frozen: tuple[str, ...] = ()
    """Parts that the stage would train but that stay unchanged."""
    resume: Path | None = None
    """Training checkpoint to resume from; set by the learner group."""


@dataclass(frozen=True, kw_only=True)
class DpoJob:
    """A preference stage on a table of pairs."""

    kind: ClassVar[str] = "dpo"
    start: Policy
    table: Path
    recipe: Recipe
    dpo: DpoConfig
    output: Path
    seed: int
    probe: Probe
    """Image whose log-probability under the trained weights is returned."""
    resume: Path | None = None
    """Training checkpoint to resume from; set by the learner group."""
    parts: int = 1
    """Number of parts in which the table arrives."""
    states: Path | None = None
    """Folder of the language model's states (`vargpt_rl.data.states`) of pairs and probe; None computes them."""


@dataclass(frozen=True, kw_only=True)
class TokenizerJob:
    """Image-tokenizer training on images loaded by key, at the run's first resolution."""

    kind: ClassVar[str] = "tokenizer"
    start: Policy
    keys: list[str]
    source: ImageSource
    """Loads the images."""
    side: int
    """Pixels per side."""
    steps: int
    batch: int
    lr: float
    output: Path
    seed: int
    resume: Path | None = None
    """Training checkpoint to resume from; set by the learner group."""


@dataclass(frozen=True, kw_only=True)
class PolicyGradientJob:
    """An online method on batches of images that the driver writes while the job runs.

    Batch n makes the optimizer steps n * updates + 1 to (n + 1) * updates. After the last of these the trained weights
    are saved as ``output/step-NNNNNN``, and then the step is logged; ``step-000000`` is the start. The job ends after
    ``recipe.steps`` steps, or when the folder has a file ``stop`` and all batches are used. Batches must stay until a
    later training checkpoint exists, since a resumed job repeats the steps after its checkpoint.
    """

    kind: ClassVar[str] = "policy_gradient"
    start: Policy
    batches: Path
    """Folder of the batches (`vargpt_rl.data.policy_batches.batch_path`)."""
    recipe: Recipe
    """``batch`` counts images and is the most that a file may have."""
    rl: RlConfig
    output: Path
    seed: int
    probe: Probe
    """Image whose log-probability under the trained weights is returned."""
    method: str = "grpo"
    """Row of `learners.methods.ONLINE`."""
    states: Path | None = None
    """Folder of the language model's states (`vargpt_rl.data.states`) of images and probe; None computes them."""
    resume: Path | None = None
    """Training checkpoint to resume from; set by the learner group."""


@dataclass(frozen=True, kw_only=True)
class RewardJob:
    """Bradley-Terry training of a learned reward on the understanding half of ``start``."""

    kind: ClassVar[str] = "reward"
    start: Policy
    pairs: Path
    """Folder of the pairs and their images (`vargpt_rl.data.reward_pairs`)."""
    recipe: Recipe
    reward: LearnedRewardConfig
    output: Path
    seed: int
    resume: Path | None = None
    """Training checkpoint to resume from; set by the learner group."""


TrainerJob = SftJob | DpoJob | PolicyGradientJob | RewardJob
"""Jobs of a trainer, which all ranks share."""
Job = TrainerJob | TokenizerJob


def layout_of(job: TrainerJob, ranks: int) -> Layout:
    """Return how ``ranks`` share a job. One that resumes with other ranks or micro-batches has a seed of its own."""
    layout = Layout(ranks=ranks, micro_batch=job.recipe.micro_batch, zero=job.recipe.zero, seed=job.seed)
    if job.resume is None:
        return layout
    before = read_layout(job.resume)[0]
    if layout.reads_as(before):
        return replace(layout, seed=before.seed)
    step = int(job.resume.name.rpartition("-")[2])
    return replace(layout, seed=int(np.random.default_rng([job.seed, step]).integers(2**31)))
