"""Jobs of a learner group. Imports no trainer and no DeepSpeed, since the driver makes these."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from learners.config import DpoConfig, Recipe
from vargpt_rl.data.batches import ImageSource
from vargpt_rl.data.records.loading import RecordStream
from vargpt_rl.data.samples import ImageQuestion, Probe
from vargpt_rl.storage.checkpoint import Policy


def training_checkpoints(output: Path) -> Path:
    """Folder of a job's training checkpoints, kept until the driver has recorded the job's result."""
    return output / "trainer"


def save_request(output: Path) -> Path:
    """File whose presence asks a job to save a training checkpoint after its current step."""
    return output / "save"


@dataclass(frozen=True)
class QuestionSet:
    """Questions about images: rows of (image key, question, answer), loaded by ``source`` at ``side`` pixels a side.

    ``drawing_share`` is the share of each batch that is drawings instead.
    """

    rows: list[ImageQuestion]
    source: ImageSource
    drawing_share: float
    side: int


@dataclass(frozen=True, kw_only=True)
class SftJob:
    """A supervised stage on the drawings encoded in ``corpus``, or on the records streamed by ``feed``."""

    kind: ClassVar[str] = "sft"
    stage: str
    start: Policy
    corpus: Path | None
    recipe: Recipe
    output: Path
    seed: int
    probe: Probe
    """Image whose log-probability under the trained weights is returned."""
    questions: QuestionSet | None = None
    save_steps: tuple[int, ...] = ()
    """Steps after which intermediate weights are saved as ``output/step-NNNNNN``."""
    feed: RecordStream | None = None
    source: ImageSource | None = None
    """Loads the images that prompts show."""
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


Job = SftJob | DpoJob | TokenizerJob
