"""Every setting of a run, its default and its meaning. Unknown keys are errors.

Defaults are the embedded demo: the tiny model on the shapes world, sized for two CPU cores.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from actors.resources import RolloutConfig
from learners.config import DpoConfig, LearnerConfig, Recipe
from vargpt_rl.data.records.sources import RecordSource
from vargpt_rl.model.generate import SamplingConfig
from vargpt_rl.model.scales import STRIDE, schedule_for, token_count

STAGES = ("tokenizer", "pretrain", "understanding", "align")
TINY = "tiny"


@dataclass
class DataConfig:
    """Where pictures and captions come from. ``kind``: shapes (drawn on demand), captioned (a folder of pictures) or
    records (streams of conversations).

    ``seen_side``: pixels a side at which pictures are shown to the understanding path.

    For captions and for records: ``max_bad_fraction`` of them may be unusable; ``held_out_fraction`` of them, chosen by
    a hash of their ids, is never trained on but measured on (of records, those with a picture to draw).

    For records: ``sources`` by name, each with the keys of ``vargpt_rl.data.records.sources.RecordSource``. All records
    of a source are drawings (edits count as such) or all are understanding, as the first. ``block`` rows are shuffled
    together, in each of ``workers`` processes of each rank. Rows of more than ``max_tokens`` are set aside. Shown
    pictures keep their shape and have at most ``seen_pixels``. ``pack``: short texts share a row. ``encoded``: a folder
    with the features of pictures to draw, for each resolution a sub-folder named after it (``DIR/256``) that
    ``vargpt_rl.data.encode`` made; without it the learner runs the image tokenizer.
    """

    kind: str = "shapes"
    captions: str | None = None
    images: str | None = None
    max_bad_fraction: float = 0.01
    held_out_fraction: float = 0.1
    seen_side: int = 224
    sources: dict[str, Any] = field(default_factory=dict)
    block: int = 1000
    workers: int = 2
    max_tokens: int = 4096
    seen_pixels: int = 401_408
    pack: bool = True
    encoded: str | None = None

    def __post_init__(self):
        if self.kind not in ("shapes", "captioned", "records"):
            raise ValueError(f"data.kind={self.kind}: expected shapes, captioned or records")
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(f"data.held_out_fraction={self.held_out_fraction}: expected 0 or more and less than 1")
        for key, least in (("block", 1), ("workers", 0), ("max_tokens", 1), ("seen_pixels", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"data.{key}={getattr(self, key)}: expected {least} or more")
        if (self.sources or self.encoded) and self.kind != "records":
            raise ValueError(f"data.sources and data.encoded are for data=records, not for data.kind={self.kind}")

    def records(self) -> dict[str, RecordSource]:
        """The sources. ValueError for an unknown key or a bad value in one, and where there are none."""
        found = {}
        for name, keys in self.sources.items():
            try:
                found[name] = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RecordSource), keys))
            except (OmegaConfBaseException, ValueError) as error:
                raise ValueError(f"data.sources.{name}: {str(error).splitlines()[0]}") from error
        if not found:
            raise ValueError("data.sources: none given, expected +data.sources.NAME.files=[FILE,...]")
        return found


@dataclass
class TokenizerStage:
    """Image-tokenizer training, for pictures that the starting checkpoint's tokenizer does not know."""

    steps: int = 400
    batch: int = 8
    lr: float = 1e-3
    pictures: int = 600


@dataclass
class PretrainStage:
    """Only the two generation projectors train, on drawings."""

    records: int = 256
    recipe: Recipe = field(default_factory=lambda: Recipe(steps=20, batch=16, micro_batch=8, lr=2e-4))


@dataclass
class UnderstandingStage:
    """The language model and the vision projector train, on questions and a share of drawings."""

    records: int = 256
    questions: int = 1024
    drawing_share: float = 0.25
    recipe: Recipe = field(default_factory=lambda: Recipe(steps=40, batch=32, micro_batch=16, lr=2e-4))


@dataclass
class SftStage:
    """The visual decoder and both projectors train, on drawings, at one resolution.

    ``checkpoints``: after which fractions of the run weights are kept to sample losers from; the papers say only
    "different SFT checkpoints and the fully SFT-trained model", so the demo takes one halfway and the final one, with
    equal shares of the prompts.
    """

    records: int = 2048
    checkpoints: list[float] = field(default_factory=lambda: [0.5])
    recipe: Recipe = field(default_factory=lambda: Recipe(steps=100, batch=32, micro_batch=16, lr=1e-4))


@dataclass
class PreferenceConfig:
    """How pairs are made. ``winners``: a folder of the stronger system's pictures, matched by file name (captioned
    data) or by the prompt's id, as ``<id>.png``, .jpg, .jpeg or .webp (records; a held-out record without one there has
    its own picture for a winner). ``builder``: ``module:name`` or ``file.py:name``; ``prompts``: a file of prompts
    instead of the source's own; ``count`` prompts are drawn ``samples`` times each.
    """

    builder: str = "rewards.preferences:external_winner"
    winners: str | None = None
    prompts: str | None = None
    count: int = 256
    samples: int = 1


@dataclass
class RewardConfig:
    """``path``: ``module:Name`` or ``file.py:name``; null scores nothing. ``options`` go to a class's constructor.

    Several rewards: ``rewards.combined:WeightedSum``, whose ``options.terms`` are named rewards with the keys of
    ``rewards.processes.Term``.
    """

    path: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class DpoStage(DpoConfig):
    """DPO on the pairs of this iteration. ``control`` also trains SFT on the winners, for as many steps, to compare.

    The rate is low on purpose: with external winners, ten times as much drives pair accuracy to 1 while pictures get
    worse. An SFT anchor (``loss_type=[sigmoid,sft]``) is the other remedy.
    """

    control: bool = True
    recipe: Recipe = field(default_factory=lambda: Recipe(steps=60, batch=16, micro_batch=4, lr=2e-5))


@dataclass
class EvaluationConfig:
    """Held-out prompts drawn after each stage, questions asked, and pictures in the sample grid."""

    prompts: int = 120
    questions: int = 120
    grid: int = 8


@dataclass
class TrackingConfig:
    """wandb's mode and project; the metrics are always in ``metrics.jsonl`` too."""

    wandb: str = "offline"
    project: str = "vargpt_rl"

    def __post_init__(self):
        if self.wandb not in ("offline", "online", "disabled"):
            raise ValueError(f"tracking.wandb={self.wandb}: expected offline, online or disabled")


@dataclass
class LoopConfig:
    """A whole run. Iteration k aligns at ``resolutions[min(k, last)]``.

    ``name`` null names the run after its data and resolutions; ``checkpoint`` is "tiny" or a model directory.
    ``at`` holds what differs at a resolution (``at.512.sft.recipe.steps``); the papers too train fewer steps on smaller
    batches at 512 px.
    """

    name: str | None = None
    runs: str = "runs"
    seed: int = 0
    checkpoint: str = TINY
    stages: list[str] = field(default_factory=lambda: ["pretrain", "understanding", "align"])
    iterations: int = 2
    resolutions: list[int] = field(default_factory=lambda: [128, 256])
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerStage = field(default_factory=TokenizerStage)
    pretrain: PretrainStage = field(default_factory=PretrainStage)
    understanding: UnderstandingStage = field(default_factory=UnderstandingStage)
    sft: SftStage = field(default_factory=SftStage)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(cfg=1.0))
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    dpo: DpoStage = field(default_factory=DpoStage)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    at: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self):
        if not self.checkpoint:
            raise ValueError("checkpoint is not set: expected checkpoint=DIR, a model directory")
        unknown = [stage for stage in self.stages if stage not in STAGES]
        if unknown or not self.stages:
            raise ValueError(f"stages={self.stages}: unknown {unknown}, expected some of {list(STAGES)}")
        if self.stages != sorted(self.stages, key=STAGES.index):
            raise ValueError(f"stages={self.stages}: expected in the order {list(STAGES)}")
        if not self.resolutions or self.iterations < len(self.resolutions):
            raise ValueError(
                f"iterations={self.iterations} with resolutions={self.resolutions}: expected at least as many "
                f"iterations as resolutions (further ones repeat the last)"
            )
        for resolution in self.resolutions:
            if resolution <= 0 or resolution % STRIDE:
                raise ValueError(f"resolutions={self.resolutions}: {resolution} is not a positive multiple of {STRIDE}")
        if self.data.kind == "captioned":
            needed = {
                "data.captions": self.data.captions,
                "data.images": self.data.images,
                "preference.winners": self.preference.winners,
            }
            for key, value in needed.items():
                if value is None:
                    raise ValueError(f"{key} is not set: data=captioned needs {', '.join(needed)}")
            if "understanding" in self.stages:
                raise ValueError("stages: understanding needs questions, which data=captioned has not; leave it out")
        if self.data.kind == "records":
            self._check_records()
        for stage in ("pretrain", "understanding", "sft", "dpo"):
            recipe = getattr(self, stage).recipe
            try:
                recipe.accumulation(self.learner.ranks)
            except ValueError as error:
                raise ValueError(f"{stage}.recipe: {error}") from error

        for resolution in self.at:
            if not resolution.isdecimal():
                raise ValueError(f"at.{resolution}: expected a resolution in pixels")
            self.at_resolution(int(resolution))

    def _check_records(self) -> None:
        """ValueError for what data=records lacks."""
        self.data.records()
        for stage in self.stages:
            if stage not in ("pretrain", "understanding", "align"):
                raise ValueError(
                    f"stages: {stage} needs pictures that can be chosen, which data=records, a stream, has not; leave "
                    f"it out and start from a checkpoint that needs none"
                )
        for resolution in self.resolutions:
            tokens = token_count(schedule_for(resolution))
            if self.data.max_tokens <= tokens:
                raise ValueError(f"data.max_tokens={self.data.max_tokens}: a picture of {resolution} px has {tokens}")
        needed = {"preference.prompts": self.preference.prompts, "preference.winners": self.preference.winners}
        for key, value in needed.items():
            if "align" in self.stages and value is None:
                raise ValueError(f"{key} is not set: with data=records the iterations need {' and '.join(needed)}")

    def at_resolution(self, resolution: int) -> "LoopConfig":
        """The settings in force at a resolution. ValueError for an unknown key or a bad value under ``at``."""
        settings = OmegaConf.structured(self)
        settings.at = {}
        try:
            return OmegaConf.to_object(OmegaConf.merge(settings, self.at.get(str(resolution), {})))
        except OmegaConfBaseException as error:
            raise ValueError(f"at.{resolution}: {str(error).splitlines()[0]}") from error

    @property
    def directory(self) -> Path:
        """The run directory."""
        name = self.name or "-".join([self.data.kind, *map(str, self.resolutions)])
        if Path(name).name != name:
            raise ValueError(f"name={name}: expected a plain name, the folder is runs={self.runs}")
        return Path(self.runs) / name
