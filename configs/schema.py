"""Every setting of a run, its default and its meaning. Unknown keys are errors.

Defaults are the embedded demo: the tiny model on the shapes world, sized for two CPU cores.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from actors.config import PlacementConfig, RolloutConfig
from learners.config import DpoConfig, LearnerConfig, Recipe
from vargpt_rl.data.config import DataConfig
from vargpt_rl.model.generate import SamplingConfig
from vargpt_rl.model.hub import TINY
from vargpt_rl.model.scales import STRIDE, schedule_for, token_count
from vargpt_rl.stages import STAGES as TRAINED

STAGES = ("tokenizer", "pretrain", "understanding", "align", "edit")


@dataclass
class TokenizerStage:
    """Image-tokenizer training, for images that the starting checkpoint's tokenizer does not know."""

    steps: int = 400
    batch: int = 8
    lr: float = 1e-3
    images: int = 600


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
    "different SFT checkpoints and the fully SFT-trained model", so the demo takes one halfway and the final one.
    ``shares``: which share of the samples each of them draws, the final model the rest; empty for equal shares.
    ``frozen``: parts (projector_in, projector_out, image_decoder) that stay as they are, for ablations.
    """

    records: int = 2048
    checkpoints: list[float] = field(default_factory=lambda: [0.5])
    shares: list[float] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    recipe: Recipe = field(default_factory=lambda: Recipe(steps=100, batch=32, micro_batch=16, lr=1e-4))

    def __post_init__(self):
        if not all(0 < fraction <= 1 for fraction in self.checkpoints):
            raise ValueError(f"sft.checkpoints={self.checkpoints}: expected fractions above 0 and up to 1")
        if self.shares and len(self.shares) != len(self.checkpoints):
            raise ValueError(f"sft.shares={self.shares}: expected one for each of sft.checkpoints={self.checkpoints}")
        if not all(share >= 0 for share in self.shares) or sum(self.shares) > 1 + 1e-9:
            raise ValueError(f"sft.shares={self.shares}: expected 0 or more each and at most 1 in all")

    def sources(self) -> dict[int, float]:
        """Steps after which weights draw losers, the last one included, each with its share of the samples."""
        given = [*self.shares, max(0.0, 1 - sum(self.shares))] if self.shares else [1] * (len(self.checkpoints) + 1)
        shares: dict[int, float] = defaultdict(float)
        for fraction, share in zip([*self.checkpoints, 1.0], given, strict=True):
            shares[max(1, round(fraction * self.recipe.steps))] += share / sum(given)
        return dict(sorted(shares.items()))


@dataclass
class EditStage:
    """All trains but the image tokenizer, on images to be edited, instructions and the images after them; at the
    last of ``resolutions``, as the paper edits at its highest.
    """

    records: int = 512
    recipe: Recipe = field(default_factory=lambda: Recipe(steps=60, batch=16, micro_batch=4, lr=2e-4))


@dataclass
class PreferenceConfig:
    """How pairs are made. ``winners``: a folder of the stronger system's images, matched by file name (captioned
    data) or by the prompt's id, as ``<id>.png``, .jpg, .jpeg or .webp (records; a held-out record without one there has
    its own image for a winner). ``builder``: ``module:name`` or ``file.py:name``, with ``options``; ``prompts``: a
    file of prompts instead of the source's own; ``count`` prompts are drawn ``samples`` times each.
    """

    builder: str = "rewards.preferences:external_winner"
    options: dict[str, Any] = field(default_factory=dict)
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

    The rate is low on purpose: with external winners, ten times as much drives pair accuracy to 1 while images get
    worse. An SFT anchor (``loss_type=[sigmoid,sft]``) is the other remedy.

    ``min_pairs``: DPO starts when so many pairs are there, while the workers make the rest, in rounds of as many
    prompts; null when all are there. Only where they do not share GPUs with the ranks.
    """

    control: bool = True
    min_pairs: int | None = None
    recipe: Recipe = field(default_factory=lambda: Recipe(steps=60, batch=16, micro_batch=4, lr=2e-5))


@dataclass
class EvaluationConfig:
    """Held-out prompts drawn after each stage, questions asked, edits drawn, and images in the sample grid.

    ``reward`` judges the drawings and has no part in training; without one, the shapes world has its exact check, and
    other data the training reward alone.
    """

    prompts: int = 120
    questions: int = 120
    edits: int = 60
    grid: int = 8
    reward: RewardConfig = field(default_factory=RewardConfig)


@dataclass
class TrackingConfig:
    """wandb's mode and project; the metrics are always in ``metrics.jsonl`` too. ``table_rows``: pairs shown there.

    ``best``: the policy with the highest such value is kept in ``best/`` beside the last one, at whatever resolution;
    a moment of the evaluation and one of its metrics, or null to keep none.
    """

    wandb: str = "offline"
    project: str = "vargpt_rl"
    table_rows: int = 16
    best: str | None = "after_dpo.overall"

    def __post_init__(self):
        moment, _, metric = (self.best or "after_dpo.overall").partition(".")
        if moment not in ("after_sft", "after_dpo") or not metric:
            raise ValueError(f"tracking.best={self.best}: expected after_sft.METRIC or after_dpo.METRIC, or null")
        if self.table_rows < 0:
            raise ValueError(f"tracking.table_rows={self.table_rows}: expected 0 or more")
        if self.wandb not in ("offline", "online", "disabled"):
            raise ValueError(f"tracking.wandb={self.wandb}: expected offline, online or disabled")


@dataclass
class LoopConfig:
    """A whole run. Iteration k aligns at ``resolutions[min(k, last)]``.

    ``name`` null names the run after its data and resolutions; ``checkpoint`` is "tiny", "tiny_v1", a model directory
    or a hub name. ``stages`` leaves editing out: at 256 px it would take the demo beyond ten minutes on two cores.
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
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    dpo: DpoStage = field(default_factory=DpoStage)
    edit: EditStage = field(default_factory=EditStage)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    at: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self):
        if not self.checkpoint:
            raise ValueError("checkpoint is not set: expected checkpoint=DIR or org/name")
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
            for stage, needed in (("understanding", "questions"), ("edit", "edited images")):
                if stage in self.stages:
                    raise ValueError(f"stages: {stage} needs {needed}, which data=captioned has not; leave it out")
        if self.data.kind == "records":
            self._check_records()
        if self.reward.path and self.evaluation.reward == self.reward:
            raise ValueError(
                f"evaluation.reward.path={self.reward.path}: that is the training reward, expected another"
            )
        try:
            TRAINED["sft"].without(self.sft.frozen)
        except ValueError as error:
            raise ValueError(f"sft.frozen={self.sft.frozen}: {error}") from error
        if self.dpo.min_pairs is not None:
            if self.dpo.min_pairs < self.dpo.recipe.batch:
                raise ValueError(
                    f"dpo.min_pairs={self.dpo.min_pairs}: expected at least dpo.recipe.batch={self.dpo.recipe.batch}, "
                    "or null"
                )
            if self.placement.is_colocated:
                raise ValueError("dpo.min_pairs is for placement=split: in colocated, workers and ranks take turns")
        for stage in ("pretrain", "understanding", "sft", "dpo", "edit"):
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
            if stage == "tokenizer":
                raise ValueError(
                    f"stages: {stage} needs images that can be chosen, which data=records, a stream, has not; leave "
                    f"it out and start from a checkpoint that needs none"
                )
        for resolution in self.resolutions:
            tokens = token_count(schedule_for(resolution))
            if self.data.max_tokens <= tokens:
                raise ValueError(f"data.max_tokens={self.data.max_tokens}: an image of {resolution} px has {tokens}")
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
        except (OmegaConfBaseException, ValueError) as error:
            raise ValueError(f"at.{resolution}: {str(error).splitlines()[0]}") from error

    @property
    def directory(self) -> Path:
        """The run directory."""
        name = self.name or "-".join([self.data.kind, *map(str, self.resolutions)])
        if Path(name).name != name:
            raise ValueError(f"name={name}: expected a plain name, the folder is runs={self.runs}")
        return Path(self.runs) / name
