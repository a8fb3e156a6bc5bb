"""What a learner group is asked to do. Imports no trainer and no DeepSpeed: the driver makes these."""

from dataclasses import dataclass
from pathlib import Path

from learners.config import DpoConfig, Recipe
from vargpt_rl.data.batches import ImageSource
from vargpt_rl.data.records.loading import RecordStream
from vargpt_rl.data.samples import ImageQuestion, Probe
from vargpt_rl.storage.checkpoint import Policy


def training_checkpoints(output: Path) -> Path:
    """Where a job keeps what it would go on from, until whoever gave it has its result."""
    return output / "trainer"


def asked_to_save(output: Path) -> Path:
    """A file by which a job is asked to keep a checkpoint after its current step."""
    return output / "save"


@dataclass(frozen=True)
class QuestionSet:
    """Rows of (image key, question, answer), the source that loads the keys at ``side`` pixels, and the share of each
    batch that is drawings beside them."""

    rows: list[ImageQuestion]
    source: ImageSource
    drawing_share: float
    side: int


@dataclass(frozen=True)
class SftJob:
    """A supervised stage on the drawings encoded in ``corpus``, or on what ``feed`` streams.

    Intermediate weights are saved after ``save_steps``. ``resume``: the training checkpoint that it goes on from, which
    the group looks for. ``source`` loads the images that prompts show; ``frozen`` are
    parts of the stage that stay as they are.
    """

    stage: str
    start: Policy
    corpus: Path | None
    recipe: Recipe
    output: Path
    seed: int
    probe: Probe
    questions: QuestionSet | None = None
    save_steps: tuple[int, ...] = ()
    feed: RecordStream | None = None
    source: ImageSource | None = None
    frozen: tuple[str, ...] = ()
    resume: Path | None = None


@dataclass(frozen=True)
class DpoJob:
    """A preference stage on a table of pairs, or on the ``parts`` of it that come one after another."""

    start: Policy
    table: Path
    recipe: Recipe
    dpo: DpoConfig
    output: Path
    seed: int
    probe: Probe
    resume: Path | None = None
    parts: int = 1


@dataclass(frozen=True)
class TokenizerJob:
    """Image-tokenizer training on images that ``source`` loads by key, at the run's first resolution."""

    start: Policy
    keys: list[str]
    source: ImageSource
    side: int
    steps: int
    batch: int
    lr: float
    output: Path
    seed: int
