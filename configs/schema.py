"""Every setting of a run, its default and its meaning. Unknown keys are errors.

Defaults are the embedded demo: the tiny model on the shapes world, sized for two CPU cores.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from actors.config import PlacementConfig, RolloutConfig
from configs.consistency import check_schedule, check_together
from configs.stages import (
    DpoStage,
    RewardStage,
    RlStage,
    SftStage,
    SupervisedStage,
    TokenizerStage,
    edit_defaults,
    pretrain_defaults,
    understanding_defaults,
)
from learners.config import LearnerConfig
from learners.methods import METHODS, AlignConfig
from rewards.config import PreferenceConfig, RewardConfig
from vargpt_rl.common.dtypes import DTYPES
from vargpt_rl.common.settings import (
    Between,
    Count,
    CountOrNone,
    FolderName,
    Line,
    MultipleOf,
    OneLine,
    OneOf,
    at_iteration,
    changed,
    merge,
)
from vargpt_rl.data.config import DataConfig
from vargpt_rl.model.adapter import AdapterConfig
from vargpt_rl.model.generate import SamplingConfig
from vargpt_rl.model.hub import TINY
from vargpt_rl.model.scales import STRIDE
from vargpt_rl.stages import ALIGN, RUN_STAGES, Learns, stages_of

ONCE = (
    "name", "runs", "seed", "checkpoint", "dtype", "stages", "iterations", "resolutions", "data", "placement",
    "learner", "rollout.workers", "rollout.gpus_per_worker", "rollout.transport", "rollout.text_engine",
    "rollout.text_gpus", "rollout.cuda_graphs", "reward", "evaluation.reward",
)  # fmt: skip
"""Keys that a run reads once, whatever the resolution."""


def _keys(settings: Mapping[str, Any]) -> set[str]:
    """Return the keys of nested settings, and those of the groups that they are in."""
    inside = {f"{name}.{key}" for name, part in settings.items() if isinstance(part, Mapping) for key in part}
    return {*settings, *inside}


@dataclass
class EvaluationConfig:
    """Sizes of the evaluation after each stage."""

    prompts: Count = 120
    """Held-out prompts."""
    questions: CountOrNone = 120
    """Held-out questions."""
    edits: CountOrNone = 60
    """Held-out edits."""
    diversity: CountOrNone = 4
    """Held-out prompts of which four images each are drawn, to measure how far they differ; 0 measures nothing."""
    grid: Count = 8
    """Columns of the sample grid."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Judge of held-out images, which has no part in training.

    Without one, images are scored by the data source's exact check if it has one, else by the training reward.
    """


@dataclass
class TrackingConfig:
    """Tracking by wandb. All metrics are always in ``metrics.jsonl`` too."""

    wandb: Annotated[str, OneOf("offline", "online", "disabled")] = "offline"
    """offline, online or disabled."""
    project: Line = "vargpt_rl"
    """wandb's project."""
    table_rows: CountOrNone = 16
    """Pairs of an iteration whose images are kept, small, for the run's page and for wandb."""
    images: CountOrNone = 120
    """Held-out images of each moment that are kept, small, for the run's page."""
    best: Line | None = "last.overall"
    """Moment and metric of the evaluation by which the best policy is kept in ``best/RESOLUTION``; null keeps none.

    "last" is the moment after the last of ``align.methods`` that changes the policy. The policy with the highest value
    at a resolution is kept beside the last one.
    """

    def __post_init__(self):
        moment, _, metric = (self.best or "last.overall").partition(".")
        moments = ["last", "after_sft", *(f"after_{method}" for method in METHODS if method != "reward")]
        if moment not in moments or not metric:
            raise ValueError(f"tracking.best={self.best}: expected MOMENT.METRIC with one of {moments}, or null")


@dataclass
class LoopConfig:
    """A whole run. Iteration k aligns at ``resolutions[min(k, last)]``."""

    name: Annotated[str, FolderName()] | None = None
    """Name of the run; null names it after its data and resolutions."""
    runs: Line = "runs"
    """Folder of all runs."""
    seed: Annotated[int, Between(0, 2**32 - 1)] = 0
    """Seed of everything random."""
    checkpoint: Annotated[str, OneLine(or_empty=True)] = TINY
    """Starting model: "tiny", "tiny_v1", a model directory or a hub name."""
    dtype: Annotated[str, OneOf(*DTYPES)] = "fp32"
    """Of workers and learners: auto, fp32 or bf16.

    auto is bf16 on GPUs and on CPUs that multiply bf16 matrices (AMX, AVX512-BF16), else fp32. In bf16, learners keep
    fp32 master weights. What bf16 costs in score has not been measured.
    """
    stages: list[Annotated[str, OneOf(*RUN_STAGES)]] = field(
        default_factory=lambda: ["pretrain", "understanding", "align"]
    )
    """Stages of the run, in order (see ``vargpt_rl.stages``).

    Editing is left out by default: at 256 px it would take the full demo minutes more on two cores.
    """
    iterations: Count = 2
    """Iterations of the ``align`` stage."""
    resolutions: list[Annotated[int, MultipleOf(STRIDE)]] = field(default_factory=lambda: [128, 256])
    """Pixels a side, one for each iteration; further iterations repeat the last."""
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerStage = field(default_factory=TokenizerStage)
    pretrain: SupervisedStage = field(default_factory=pretrain_defaults)
    """The stage in which only the two generation projectors train, on drawings.

    With data=records, the recipe alone says how much is read.
    """
    understanding: SupervisedStage = field(default_factory=understanding_defaults)
    """The stage in which the language model and the vision projector train, on questions and drawings."""
    sft: SftStage = field(default_factory=SftStage)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(cfg=1.0))
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    dpo: DpoStage = field(default_factory=DpoStage)
    learned_reward: RewardStage = field(default_factory=RewardStage)
    rl: RlStage = field(default_factory=RlStage)
    edit: SupervisedStage = field(default_factory=edit_defaults)
    """The stage in which all but the image tokenizer trains, on edits, at the last of ``resolutions``."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    at: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings that differ at a resolution (``at.512.sft.recipe.steps``).

    The papers too train fewer steps on smaller batches at 512 px.
    """

    def __post_init__(self):
        if not self.checkpoint:
            raise ValueError("checkpoint is not set: expected checkpoint=DIR or org/name")
        check_together(self)

    def check_resolutions(self) -> None:
        """ValueError for a bad setting under ``at``, and for what does not fit the images of a resolution."""
        for resolution in self.at:
            if not re.fullmatch("[1-9][0-9]{0,8}", resolution) or int(resolution) not in MultipleOf(STRIDE):
                raise ValueError(f"at.{resolution}: expected a resolution in pixels, {MultipleOf(STRIDE)}")
            if once := [key for key in ONCE if key in _keys(self.at[resolution])]:
                raise ValueError(f"at.{resolution}.{once[0]}: the same at all resolutions, expected it without at")
            if "adapter" in self.at[resolution]:
                key = next(iter(self.at[resolution]["adapter"]), "KEY")
                raise ValueError(f"at.{resolution}.adapter.{key}: a run has one adapter, expected adapter.{key}=VALUE")
            if given := {"pairs", "pair_images"} & self.at[resolution].get("preference", {}).keys():
                raise ValueError(f"at.{resolution}.preference.{min(given)}: a run has one set of pairs")
            if int(resolution) not in self.resolutions:  # no stage runs with it: keys and ranges alone
                merge(replace(self, at={}), self.at[resolution], f"at.{resolution}")
        for pixels in self.resolutions:
            check_schedule(self.at_resolution(pixels), pixels)

    @property
    def recipes(self) -> list[str]:
        """The blocks whose recipes DeepSpeed trains in this run."""
        rows = [row for row in stages_of(self.stages) if row.learns is not Learns.IMAGES]
        blocks = [row.block for row in rows if row.name not in self.align.left_out]
        learned = ["learned_reward"] if ALIGN in self.stages and "reward" in self.align.methods else []
        return list(dict.fromkeys([*blocks, *learned, *(["rl"] if self.runs_rl else [])]))

    @property
    def runs_dpo(self) -> bool:
        """Tell whether the run trains on preference pairs."""
        return ALIGN in self.stages and "dpo" in self.align.methods

    @property
    def needs_winners(self) -> bool:
        """Tell whether the run makes pairs of a stronger system's images."""
        return ALIGN in self.stages and self.align.learns_pairs and self.preference.uses_winners

    @property
    def runs_rl(self) -> bool:
        """Tell whether the run trains on rewards of the policy's own images."""
        return ALIGN in self.stages and bool(self.align.online)

    def at_resolution(self, resolution: int) -> "LoopConfig":
        """Return the settings in force at a resolution. ValueError for an unknown key or a bad value under ``at``."""
        base = copy.copy(self)  # not made anew: the run's own values need not fit one resolution
        base.at = {}
        base.resolutions = [resolution]
        return changed(base, self.at.get(str(resolution), {}), f"at.{resolution}")

    def with_batch_size(self, resolution: int, size: int) -> "LoopConfig":
        """Return settings whose workers compute ``size`` images at once at a resolution."""
        changed = copy.copy(self)
        at = self.at.get(str(resolution), {})
        changed.at = self.at | {str(resolution): at | {"rollout": at.get("rollout", {}) | {"batch_size": size}}}
        return changed

    def with_dtype(self, dtype: str) -> "LoopConfig":
        """Return settings with another dtype."""
        changed = copy.copy(self)
        changed.dtype = dtype
        return changed

    def resolution_of(self, iteration: int) -> int:
        """Pixels a side of an iteration; those beyond the last resolution repeat it."""
        return at_iteration(self.resolutions, iteration)

    @property
    def last_resolution(self) -> int:
        """Pixels a side of the last iteration."""
        return self.resolutions[-1]

    @property
    def best(self) -> tuple[str, str]:
        """Moment and metric by which the best policy is kept; empty if none is."""
        moment, _, metric = (self.tracking.best or "").partition(".")
        return (self.align.last_moment if moment == "last" else moment), metric

    @property
    def directory(self) -> Path:
        """The run directory."""
        name = self.name or "-".join([self.data.kind, *map(str, self.resolutions)])
        return Path(self.runs) / name
