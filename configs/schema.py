"""Every setting of a run, its default and its meaning. Unknown keys are errors.

Defaults are the embedded demo: the tiny model on the shapes world, sized for two CPU cores.
"""

import copy
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch

from actors.config import PlacementConfig, RolloutConfig
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
from learners.config import LearnerConfig, Recipe
from learners.methods import ONLINE
from rewards.preferences import HUMAN
from vargpt_rl.common.dtypes import DTYPES, chosen_dtype
from vargpt_rl.common.settings import Between, Count, CountOrNone, FolderName, MultipleOf, OneOf, merge, parse
from vargpt_rl.data.config import DataConfig
from vargpt_rl.model.adapter import AdapterConfig
from vargpt_rl.model.generate import SamplingConfig
from vargpt_rl.model.hub import TINY
from vargpt_rl.model.scales import STRIDE, schedule_for, token_count
from vargpt_rl.stages import ALIGN, RUN_STAGES, STAGES, Learns, stages_of

METHODS = ("dpo", "reward", *ONLINE)
"""Alignment methods of an iteration."""


@dataclass
class AlignConfig:
    """Alignment of an iteration."""

    sft: bool = True
    """Begin with SFT. Without it, online methods start from the policy as it is; DPO samples from SFT's checkpoints."""
    methods: list[Annotated[str, OneOf(*METHODS)]] = field(default_factory=lambda: ["dpo"])
    """Methods, in the order in which they are applied, each from the policy of the last: dpo, reward, rft, online_dpo,
    grpo.

    dpo: on pairs of samples and winners, as in the paper. reward: leaves the policy as it is and learns a reward from
    the pairs, which the methods after it maximise instead of ``reward.path``. The others: online, on rewards of the
    policy's own images.
    """

    def __post_init__(self):
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"align.methods={self.methods}: expected some of {list(METHODS)}, each at most once")

    @property
    def online(self) -> list[str]:
        """The methods that draw and judge their own images."""
        return [method for method in self.methods if method in ONLINE]

    @property
    def learns_pairs(self) -> bool:
        """Tell whether a method learns from preference pairs."""
        return "dpo" in self.methods or "reward" in self.methods

    @property
    def unlearned(self) -> list[str]:
        """The online methods without a learned reward before them."""
        learned = self.methods.index("reward") if "reward" in self.methods else len(self.methods)
        return [method for method in self.online if self.methods.index(method) < learned]

    @property
    def last_moment(self) -> str:
        """Moment of the evaluation after the last method that changes the policy."""
        return f"after_{next((method for method in reversed(self.methods) if method != 'reward'), 'sft')}"

    @property
    def left_out(self) -> set[str]:
        """Rows of the stage table (``vargpt_rl.stages``) that an iteration leaves out."""
        return (set() if self.sft else {"sft"}) | (set() if "dpo" in self.methods else {"dpo", "sft_on_winners"})


@dataclass
class PreferenceConfig:
    """Preference pairs of an iteration."""

    builder: str = "rewards.preferences:external_winner"
    """Preference builder: ``module:name`` or ``file.py:name``."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the builder."""
    winners: str | None = None
    """Folder of the stronger system's images.

    Matched by file name (captioned data) or by the prompt's id, as in ``<id>.png`` (records; a held-out record without
    one there has its own image as winner). Letter case, Unicode normal form and ending may differ.
    """
    pairs: str | None = None
    """File or folder of pairs that people have judged: two images, a prompt, who won (Pick-a-Pic, HPDv2, JSON lines).

    All of them replace samples, winners and builder: nothing is drawn for pairs. See docs/preferences.md.
    """
    pair_images: str | None = None
    """Folder in which the images that ``pairs`` names are; null is the folder of the file."""
    prompts: str | None = None
    """File of prompts, instead of the data source's own."""
    count: Count = 128
    """Prompts per iteration."""
    samples: Count = 1
    """Samples of each prompt."""

    @property
    def asks_people(self) -> bool:
        """Tell whether people label the pairs."""
        return self.builder == HUMAN


@dataclass
class RewardConfig:
    """A reward plug-in.

    Several rewards: ``rewards.combined:WeightedSum``, whose ``options.terms`` are named rewards with the keys of
    ``rewards.processes.RewardTerm``.
    """

    path: str | None = None
    """``module:Name`` or ``file.py:name``; null scores nothing."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of a class's constructor."""


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
    project: str = "vargpt_rl"
    """wandb's project."""
    table_rows: CountOrNone = 16
    """Pairs of an iteration whose images are kept, small, for the run's page and for wandb."""
    images: CountOrNone = 120
    """Held-out images of each moment that are kept, small, for the run's page."""
    best: str | None = "last.overall"
    """Moment and metric of the evaluation by which the best policy is kept in ``best/RESOLUTION``; null keeps none.

    "last" is the moment after the last of ``align.methods`` that changes the policy. The policy with the highest value
    at a resolution is kept beside the last one.
    """

    def __post_init__(self):
        moment, _, metric = (self.best or "last.overall").partition(".")
        moments = ["last", "after_sft", *(f"after_{method}" for method in METHODS if method != "reward")]
        if moment not in moments or not metric:
            raise ValueError(f"tracking.best={self.best}: expected MOMENT.METRIC with one of {moments}, or null")


def _check_bitsandbytes(setting: str, on_gpu: bool, expected: str) -> None:
    if not on_gpu:
        raise ValueError(f"{setting}: bitsandbytes is used on GPUs, of which there are none; expected {expected}")
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"{setting}: bitsandbytes is not installed here; pip install 'vargpt-rl[qlora]' brings it")


@dataclass
class LoopConfig:
    """A whole run. Iteration k aligns at ``resolutions[min(k, last)]``."""

    name: Annotated[str, FolderName()] | None = None
    """Name of the run; null names it after its data and resolutions."""
    runs: str = "runs"
    """Folder of all runs."""
    seed: Annotated[int, Between(0, 2**32 - 1)] = 0
    """Seed of everything random."""
    checkpoint: str = TINY
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

    Editing is left out by default: at 256 px it would take the demo beyond ten minutes on two cores.
    """
    iterations: Count = 2
    """Iterations of the ``align`` stage."""
    resolutions: list[Annotated[int, MultipleOf(STRIDE)]] = field(default_factory=lambda: [128, 256])
    """Pixels a side, one for each iteration; further iterations repeat the last."""
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerStage = field(default_factory=TokenizerStage)
    pretrain: SupervisedStage = field(default_factory=pretrain_defaults)
    understanding: SupervisedStage = field(default_factory=understanding_defaults)
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
        self._check_stages()
        self._check_iterations()
        self._check_own_pairs()
        self._check_asked()
        self._check_data()
        self._check_recipes()
        self._check_overlap()
        self._check_learned()
        self._check_online()
        self._check_adapter()
        if self.reward.path and self.evaluation.reward == self.reward:
            raise ValueError(
                f"evaluation.reward.path={self.reward.path}: that is the training reward, expected another"
            )

    def _check_asked(self) -> None:
        """ValueError for what does not go with pairs that people label."""
        if not (self.preference.asks_people and ALIGN in self.stages and self.align.learns_pairs):
            return
        if self.dpo.min_pairs is not None:
            raise ValueError(f"dpo.min_pairs={self.dpo.min_pairs} with {HUMAN}, which waits for people: leave it out")
        if self.preference.samples < 2 and self.preference.options.get("against", "samples") == "samples":
            raise ValueError(
                f"preference.samples={self.preference.samples}: {HUMAN} compares samples of a prompt, expected at "
                "least 2, or +preference.options.against=winners"
            )

    def _check_own_pairs(self) -> None:
        """ValueError for what does not go with pairs that came from files, or needs them."""
        if self.preference.pairs is None:
            if self.data.kind == "pairs":
                raise ValueError("preference.pairs is not set: data=pairs needs it")
            if "dpo" in self.align.methods and not self.align.sft:
                raise ValueError(
                    "align.sft=false with align.methods containing dpo: its samples are from SFT's checkpoints; "
                    "expected align.sft=true or preference.pairs=..."
                )
            return
        if ALIGN not in self.stages or not self.align.learns_pairs:
            raise ValueError(f"preference.pairs with align.methods={self.align.methods}: expected dpo or reward in it")
        if self.preference.builder != PreferenceConfig.builder:
            raise ValueError(
                f"preference.builder={self.preference.builder} with preference.pairs, which has no samples"
            )
        if self.dpo.min_pairs is not None:
            raise ValueError(
                f"dpo.min_pairs={self.dpo.min_pairs} with preference.pairs, which are all there: leave it out"
            )

    def check_resolutions(self) -> None:
        """ValueError for a bad setting under ``at``, and for what does not fit the images of a resolution."""
        for resolution in self.at:
            if not resolution.isdecimal():
                raise ValueError(f"at.{resolution}: expected a resolution in pixels")
            if "adapter" in self.at[resolution]:
                key = next(iter(self.at[resolution]["adapter"]), "KEY")
                raise ValueError(f"at.{resolution}.adapter.{key}: a run has one adapter, expected adapter.{key}=VALUE")
            if given := {"pairs", "pair_images"} & self.at[resolution].get("preference", {}).keys():
                raise ValueError(f"at.{resolution}.preference.{min(given)}: a run has one set of pairs")
            if int(resolution) not in self.resolutions:  # no stage runs with it: keys and ranges alone
                merge(LoopConfig, self.at[resolution], f"at.{resolution}", replace(self, at={}))
        for pixels in self.resolutions:
            self.at_resolution(pixels)._check_schedule(pixels)

    def _check_stages(self) -> None:
        if not self.stages:
            raise ValueError(f"stages=[]: expected some of {list(RUN_STAGES)}")
        if self.stages != sorted(set(self.stages), key=RUN_STAGES.index):
            raise ValueError(f"stages={self.stages}: expected in the order {list(RUN_STAGES)}, each at most once")

    def _check_iterations(self) -> None:
        if not self.resolutions or self.iterations < len(self.resolutions):
            raise ValueError(
                f"iterations={self.iterations} with resolutions={self.resolutions}: expected at least as many "
                f"iterations as resolutions (further ones repeat the last)"
            )

    def _check_data(self) -> None:
        """ValueError for what the stages need and the kind of data lacks."""
        winners = {} if self.preference.pairs else {"preference.winners": self.preference.winners}
        if self.data.kind in ("captioned", "pairs"):
            for stage in stages_of(self.stages):
                if stage.learns in (Learns.QUESTIONS, Learns.EDITS):
                    lacking = "questions" if stage.learns is Learns.QUESTIONS else "edited images"
                    raise ValueError(
                        f"stages: {stage.name} needs {lacking}, which data={self.data.kind} lacks; leave it out"
                    )
        if self.data.kind == "captioned":
            needed = {"data.captions": self.data.captions, "data.images": self.data.images} | winners
            self._check_set(needed, f"data=captioned needs {', '.join(needed)}")
        if self.data.kind == "records":
            self.data.records()
            for stage in stages_of(self.stages):
                if stage.learns is Learns.IMAGES:
                    raise ValueError(
                        f"stages: {stage.name} needs images that can be chosen, which data=records, a stream, has not; "
                        f"leave it out and start from a checkpoint that needs none"
                    )
            for resolution in self.resolutions:
                tokens = token_count(schedule_for(resolution))
                if self.data.max_tokens <= tokens:
                    raise ValueError(
                        f"data.max_tokens={self.data.max_tokens}: an image of {resolution} px has {tokens}"
                    )
            if ALIGN in self.stages:
                needed = {"preference.prompts": self.preference.prompts} | (winners if self.align.learns_pairs else {})
                self._check_set(needed, f"with data=records the iterations need {' and '.join(needed)}")

    @staticmethod
    def _check_set(needed: dict[str, str | None], why: str) -> None:
        for key, value in needed.items():
            if value is None:
                raise ValueError(f"{key} is not set: {why}")

    def _check_recipes(self) -> None:
        """ValueError for a batch that the ranks of a stage cannot share, and for parts that a stage cannot freeze."""
        for key, name, frozen in (
            ("sft", "sft", self.sft.frozen),
            ("dpo", "dpo", self.dpo.frozen),
            ("rl", "dpo", self.rl.frozen),
        ):
            try:
                STAGES[name].without(frozen)
            except ValueError as error:
                raise ValueError(f"{key}.frozen={frozen}: {error}") from error
        for stage in stages_of(self.stages):
            if stage.learns is Learns.IMAGES or stage.name in self.align.left_out:
                continue
            self._check_recipe(stage.block)
            if stage.learns is Learns.QUESTIONS and self.data.kind != "records":
                self._check_drawing_share(stage.block)

    def _check_recipe(self, block: str) -> None:
        recipe: Recipe = getattr(self, block).recipe
        try:
            recipe.accumulation(self.learner.ranks)
            recipe.check_options()
        except ValueError as error:
            raise ValueError(f"{block}.recipe: {error}") from error

    def _check_drawing_share(self, block: str) -> None:
        settings: SupervisedStage = getattr(self, block)
        size = settings.recipe.micro_batch
        drawings = round(settings.drawing_share * size)
        if settings.questions and 0 < settings.drawing_share < 1 and drawings in (0, size):
            raise ValueError(
                f"{block}.drawing_share={settings.drawing_share}: that is {drawings} of {block}.recipe.micro_batch="
                f"{size}, expected a share of both drawings and questions"
            )

    def _check_adapter(self) -> None:
        """ValueError for what cannot train as an adapter."""
        if not self.adapter.is_on:
            return
        if self.dpo.stored_states:
            raise ValueError(
                "dpo.stored_states=true with an adapter: expected adapter=none, or dpo.stored_states=false"
            )
        for stage in stages_of(self.stages):
            if stage.learns is Learns.IMAGES:
                raise ValueError(
                    f"stages: {stage.name} trains the image tokenizer, which takes no adapter; leave it out or use "
                    f"adapter=none"
                )
        for block, runs in (("dpo", self.runs_dpo), ("rl", self.runs_rl)):
            if runs and self.adapter.scores_in_learner and getattr(self, block).recipe.zero == 3:
                raise ValueError(
                    f"adapter.reference=learner with {block}.recipe.zero=3, which splits the weights: expected zero 0, "
                    f"1 or 2, or adapter.reference=workers"
                )
        for block in self.recipes:
            if self.adapter.four_bit and getattr(self, block).recipe.zero == 3:
                raise ValueError(
                    f"adapter.four_bit={self.adapter.four_bit} with {block}.recipe.zero=3, which splits the weights: "
                    f"expected zero 0, 1 or 2"
                )
        if "reward" in self.align.methods and ALIGN in self.stages:
            raise ValueError(
                "align.methods containing reward with an adapter: a learned reward trains whole weights, expected "
                "adapter=none"
            )

    def check_devices(self, on_gpu: bool) -> None:
        """ValueError for settings that need GPUs, or bitsandbytes, where there is none."""
        for block in self.recipes:
            optimizer = getattr(self, block).recipe.optimizer
            if optimizer != "adamw":
                _check_bitsandbytes(f"{block}.recipe.optimizer={optimizer}", on_gpu, "adamw")
        if self.adapter.is_on and self.adapter.four_bit:
            _check_bitsandbytes(f"adapter.four_bit={self.adapter.four_bit}", on_gpu, "[]")
            if chosen_dtype(self.dtype, on_gpu) != torch.bfloat16:
                raise ValueError(f"dtype={self.dtype} with adapter.four_bit={self.adapter.four_bit}: expected bf16")

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
    def runs_rl(self) -> bool:
        """Tell whether the run trains on rewards of the policy's own images."""
        return ALIGN in self.stages and bool(self.align.online)

    def _check_learned(self) -> None:
        """ValueError for what a learned reward lacks."""
        methods = self.align.methods
        if "reward" not in methods or ALIGN not in self.stages:
            return
        self._check_recipe("learned_reward")
        if self.learned_reward.table is not None:
            return
        if self.preference.pairs is not None:
            return
        if not self.align.sft:
            raise ValueError(
                "align.sft=false with align.methods containing reward: the samples of its pairs are from SFT's "
                "checkpoints; expected learned_reward.table=... or align.sft=true"
            )
        before_dpo = methods.index("reward") < (methods.index("dpo") if "dpo" in methods else 0)
        if before_dpo and self.dpo.min_pairs is not None:
            raise ValueError(
                f"align.methods={methods} with dpo.min_pairs: expected dpo before reward, or no dpo.min_pairs"
            )
        pairs = self.preference.count * self.preference.samples
        if pairs * (1 - self.learned_reward.held_out) < self.learned_reward.recipe.batch:
            raise ValueError(
                f"preference.count={self.preference.count}: at most {pairs} pairs, of which "
                f"learned_reward.held_out={self.learned_reward.held_out} are not trained on; expected at least "
                f"learned_reward.recipe.batch={self.learned_reward.recipe.batch} to train on"
            )

    def _check_online(self) -> None:
        """ValueError for what online RL lacks."""
        if not self.runs_rl:
            return
        if self.reward.path is None and self.align.unlearned:
            raise ValueError(
                f"align.methods={self.align.methods}: {self.align.unlearned[0]} needs reward.path=... "
                f"or the method reward before it"
            )
        if self.rl.staleness and self.placement.is_colocated:
            raise ValueError("rl.staleness=1 is for placement=split: in colocated, workers and ranks take turns")
        self._check_recipe("rl")
        if self.rl.recipe.ema is not None and self.rl.guard.validate_every is not None:
            raise ValueError(
                f"rl.recipe.ema={self.rl.recipe.ema:g} with rl.guard.validate_every: the result is the average or the "
                f"weights of the best validation, expected one of them to be null"
            )
        images = self.rl.prompts * self.rl.group
        if self.rl.recipe.batch < images:
            raise ValueError(
                f"rl.recipe.batch={self.rl.recipe.batch}: expected at least rl.prompts x rl.group = {images}, the "
                "images of an update"
            )
        if self.rl.recipe.steps % self.rl.updates:
            raise ValueError(
                f"rl.recipe.steps={self.rl.recipe.steps}: expected a multiple of rl.updates={self.rl.updates}"
            )
        completions = self.rl.completions
        if completions > 1 and (self.rl.group % completions or self.rl.group == completions):
            raise ValueError(
                f"rl.group={self.rl.group}: expected a multiple of rl.completions={completions}, and more than one "
                f"prefix"
            )
        for method in self.align.online:
            compared = ONLINE[method].compared(self.rl, self.rl.group)
            if compared and self.rl.recipe.micro_batch % compared:
                raise ValueError(
                    f"rl.recipe.micro_batch={self.rl.recipe.micro_batch}: {method} compares {compared} images of a "
                    f"group with each other (rl.pairs={self.rl.pairs}), expected a multiple of that"
                )

    def _check_schedule(self, resolution: int) -> None:
        """ValueError for a prefix of scales longer than the schedule of a resolution."""
        scales = len(schedule_for(resolution))
        trained = {"dpo": self.dpo.credit_scales} if self.runs_dpo else {}
        trained |= {"rl": self.rl.credit_scales} if self.runs_rl else {}
        for block, prefix in trained.items():
            if prefix is not None and prefix > scales:
                raise ValueError(
                    f"{block}.credit_scales={prefix}: expected 1 to {scales}, the scales of an image of {resolution} px"
                )
        left = min(self.rl.credit_scales or scales, scales)
        if self.runs_rl and self.rl.completions > 1 and self.rl.prefix_scales >= left:
            raise ValueError(
                f"rl.prefix_scales={self.rl.prefix_scales}: expected fewer than the {left} trained scales of an image "
                f"of {resolution} px"
            )

    def _check_overlap(self) -> None:
        if self.dpo.min_pairs is None or not self.runs_dpo:
            return
        if self.dpo.min_pairs < self.dpo.recipe.batch:
            raise ValueError(
                f"dpo.min_pairs={self.dpo.min_pairs}: expected at least dpo.recipe.batch={self.dpo.recipe.batch}, "
                "or null"
            )
        if self.placement.is_colocated:
            raise ValueError("dpo.min_pairs is for placement=split: in colocated, workers and ranks take turns")

    def at_resolution(self, resolution: int) -> "LoopConfig":
        """Return the settings in force at a resolution. ValueError for an unknown key or a bad value under ``at``."""
        base = copy.copy(self)  # not made anew: the run's own values need not fit one resolution
        base.at = {}
        base.resolutions = [resolution]
        return parse(LoopConfig, self.at.get(str(resolution), {}), f"at.{resolution}", base)

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
        return self.resolutions[min(iteration, len(self.resolutions) - 1)]

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
