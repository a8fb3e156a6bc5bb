"""Jobs of a learner group. Imports no trainer and no DeepSpeed, since the driver makes these."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from learners.config import DpoConfig, Recipe
from vargpt_rl.data.images import ImageSource
from vargpt_rl.data.records.stream import RecordStream
from vargpt_rl.data.samples import Probe
from vargpt_rl.storage.checkpoint import Policy


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
