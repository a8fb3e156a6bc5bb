"""Inputs of a run besides settings: a starting model, data, plug-ins. All are checked before any worker starts."""

import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLConfig

from configs.schema import LoopConfig
from configs.stages import DpoStage, SftStage, SupervisedStage
from rewards.config import PreferenceConfig, RewardConfig
from vargpt_rl.common.plugins import BUILDER, make_plugin
from vargpt_rl.data.captioned import CaptionedConfig, CaptionedSource
from vargpt_rl.data.features import load_image_tokenizer, tokenizer_checksum
from vargpt_rl.data.own_pairs import OwnPairs, PairImages, read_own_pairs
from vargpt_rl.data.pair_sources import PairsSource, SourceWithPairs
from vargpt_rl.data.preferences import read_table
from vargpt_rl.data.quarantine import Quarantine
from vargpt_rl.data.records.align import RecordsSource, held_out_of
from vargpt_rl.data.records.stream import EDITS, RecordStream, task_of
from vargpt_rl.data.reward_pairs import check_split
from vargpt_rl.data.samples import Prompt
from vargpt_rl.data.sources import ShapesConfig, ShapesSource, Source, prompts_from_file
from vargpt_rl.model.families import load_config, markup_for
from vargpt_rl.model.hub import TINY_V1, check_model
from vargpt_rl.model.whole import check_values, check_whole
from vargpt_rl.page.contents import CONFIG
from vargpt_rl.release.tiny_v1 import make_fresh_v1
from vargpt_rl.stages import ALIGN, STAGES, Learns, Stage, freeze, stages_of
from vargpt_rl.storage.adapter import adapted_on_meta, is_adapter_folder, write_merged
from vargpt_rl.storage.export import files_beside_weights
from vargpt_rl.storage.reward_base import check_understanding

logger = logging.getLogger(__name__)

SHAPES_CHECK = "rewards.shapes:shapes_reward"
"""The reward that equals the shapes world's exact check."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Inputs of a run besides its settings."""

    model: str
    """Directory of the starting model."""
    source: Source
    """Prompts, winners and held-out data; without a ``stream``, the training data too."""
    quarantine: Quarantine
    """Unusable records and images, by reason."""
    builder: Callable
    """Preference builder."""
    reward: Callable | None
    """Training reward; None scores nothing."""
    judge: Callable | None
    """Judge of held-out images that training does not see, if there is one."""
    prompts: list[Prompt] | None
    """Prompts of a file; None uses the source's own."""
    max_bad_fraction: float
    """Share of the source's records that may be unusable."""
    pairs: OwnPairs | None = None
    """Preference pairs that came from files; None makes pairs of samples."""
    stream: RecordStream | None
    """Records that supervised stages read; None lets them choose from ``source``."""

    def check_quarantine(self) -> None:
        """ValueError, with the counts by reason, when too many records are lost."""
        if self.source.lines:
            self.quarantine.check(self.source.lines, self.max_bad_fraction)


def check_resolutions(model: str, resolutions: list[int]) -> None:
    """ValueError for a resolution that the model of this directory does not draw."""
    tokenizer = load_config(model).image_tokenizer_config
    try:
        for resolution in resolutions:
            tokenizer.schedule_for(resolution)
    except ValueError as error:
        raise ValueError(f"resolutions={list(resolutions)}: {error}") from error


def check_adapter(config: LoopConfig, model: str) -> None:
    """ValueError for an adapter that does not fit the model of this directory, or that a stage cannot train."""
    with_adapter = adapted_on_meta(model, config.adapter)
    for stage in stages_of(config.stages):
        block = getattr(config, stage.block)
        if stage.name not in config.align.left_out:
            frozen = block.frozen if isinstance(block, SftStage | DpoStage) else ()
            freeze(with_adapter, stage.without(frozen), config.adapter)
    if config.runs_rl:
        freeze(with_adapter, STAGES["dpo"].without(config.rl.frozen), config.adapter)
    if config.rollout.uses_vllm and config.adapter.four_bit:
        raise ValueError("rollout.text_engine: vllm holds nothing in 4 bits (adapter.four_bit); expected transformers")


def check_learned_reward(config: LoopConfig, model: str) -> None:
    """ValueError for a model without an understanding half, or a table that a reward cannot be learned from."""
    check_understanding(model)
    for resolution in config.resolutions:
        settings = config.at_resolution(resolution).learned_reward
        if settings.table is None:
            continue
        path = Path(settings.table)
        if not path.is_file():
            raise ValueError(f"learned_reward.table={path}: there is no such file")
        rows = read_table(path)
        if found := set(rows.resolution) - {resolution}:
            raise ValueError(f"learned_reward.table={path}: its images have {min(found)} px, expected {resolution}")
        check_split(rows, settings.held_out, config.seed, settings.recipe.batch, f"learned_reward.table={path}")


def make_reward(config: RewardConfig) -> Callable | None:
    """Return the reward that the settings name, if any. ValueError if it cannot be made."""
    return make_plugin(config.path, dict(config.options)) if config.path else None


def make_builder(path: str, options: dict[str, object], rewarded: bool) -> Callable:
    """Return a preference builder with its options, tried without samples. ValueError, naming both, if it refuses."""
    builder = make_plugin(path, options, BUILDER)
    rewards = ([], {}) if rewarded else (None, None)
    try:
        builder([], {}, *rewards)
    except (TypeError, ValueError) as error:
        raise ValueError(f"preference.builder={path} preference.options={options}: {error}") from error
    return builder


def starting_model(config: LoopConfig) -> str:
    """Return the directory of the starting model, which is made in the run's folder if need be, checked as a whole.

    ValueError naming the checkpoint and what is wrong with it.
    """
    start = config.directory / "start"
    if start.is_dir() and not (config.directory / CONFIG).exists():  # left by a start that was refused
        shutil.rmtree(start)
    if config.checkpoint == TINY_V1:
        model = str(make_fresh_v1(start, config.resolutions[0], config.seed))
    else:
        model = check_model(config.checkpoint)
    if is_adapter_folder(model):
        model = str(start.resolve() if start.is_dir() else write_merged(Path(model), start))
    try:
        check_whole(Path(model))
        check_values(Path(model))
        files_beside_weights(Path(model))
    except ValueError as error:
        raise ValueError(f"checkpoint={config.checkpoint}: {error}") from error
    return model


def gather(config: LoopConfig) -> Inputs:
    """Read and check everything the settings name. ValueError naming the key or file for whatever is wrong."""
    model = starting_model(config)
    check_resolutions(model, config.resolutions)
    if config.adapter.is_on:
        check_adapter(config, model)
    if config.rollout.uses_vllm and not isinstance(load_config(model), Qwen2VLConfig):
        raise ValueError("rollout.text_engine: vllm serves models of type 'vargpt' alone; expected transformers")
    if "reward" in config.align.methods and ALIGN in config.stages:
        check_learned_reward(config, model)
    reward = make_reward(config.reward)
    judge = make_reward(config.evaluation.reward)
    builder = make_builder(config.preference.builder, dict(config.preference.options), reward is not None)
    quarantine = Quarantine(config.directory / "quarantine.jsonl")
    prompts = prompts_from_file(Path(config.preference.prompts), quarantine) if config.preference.prompts else None
    stream = open_stream(config, model) if config.data.kind == "records" else None
    pairs, images = open_own_pairs(config, quarantine) if config.preference.pairs else (None, None)
    if config.data.kind == "pairs":
        assert pairs is not None and images is not None  # checked with the settings
        source: Source = PairsSource(pairs, images)
    else:
        source = make_source(config, stream, prompts or [], quarantine)
        if pairs is not None and images is not None:
            source = SourceWithPairs(source, pairs.lines, images)
    inputs = Inputs(
        model=model,
        source=source,
        pairs=pairs,
        quarantine=quarantine,
        builder=builder,
        reward=reward,
        judge=judge,
        prompts=prompts if stream is None else None,
        max_bad_fraction=config.data.max_bad_fraction,
        stream=stream,
    )
    inputs.check_quarantine()
    if config.needs_winners and config.data.kind != "shapes":
        check_winners(config, inputs)
    return inputs


def open_own_pairs(config: LoopConfig, quarantine: Quarantine) -> tuple[OwnPairs, PairImages]:
    """Read the pairs that came from files, and say where their images are. ValueError for what cannot be used."""
    path = Path(str(config.preference.pairs))
    folder = Path(config.preference.pair_images) if config.preference.pair_images else path
    if not config.preference.pair_images and not folder.is_dir():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"preference.pair_images={folder}: no such folder of images")
    images = PairImages(given=folder.resolve(), kept=config.directory.resolve() / "pairs")
    data = config.data
    try:
        return read_own_pairs(path, images, quarantine, data.held_out_fraction, data.max_bad_fraction), images
    except ValueError as error:
        told = str(error)
        raise ValueError(told if "preference.pairs" in told else f"preference.pairs={path}: {told}") from error


def check_winners(config: LoopConfig, inputs: Inputs) -> None:
    """Warn if there will be fewer pairs than prompts are asked for. ValueError if no training prompt has a winner."""
    prompts = inputs.prompts or inputs.source.prompts("train", sys.maxsize, config.seed)
    found = sum(inputs.source.winner_key(prompt) is not None for prompt in prompts)
    if not found:
        raise ValueError(
            f"preference.winners={config.preference.winners}: no winner of {len(prompts)} training prompts"
        )
    counts = [config.at_resolution(resolution).preference.count for resolution in config.resolutions]
    if found < min(max(counts), len(prompts)):
        logger.warning(
            "preference.winners=%s: only %d of %d training prompts have a winner, and the others give no pair",
            config.preference.winners,
            found,
            len(prompts),
        )


def make_source(
    config: LoopConfig, stream: RecordStream | None, prompts: list[Prompt], quarantine: Quarantine
) -> Source:
    """Return the data source: what is sampled and compared, and, without a ``stream``, trained on."""
    if stream is not None:
        return records_source(config, stream, prompts, quarantine)
    if config.data.kind == "shapes":
        return ShapesSource(ShapesConfig())
    captions = config.data.captions
    images = config.data.images
    winners = config.preference.winners
    assert captions is not None and images is not None  # checked with the settings
    captioned = CaptionedConfig(
        captions=captions,
        images=images,
        winners=winners,
        image_field=config.data.image_field,
        caption_field=config.data.caption_field,
        id_field=config.data.id_field,
        held_out_fraction=config.data.held_out_fraction,
    )
    return CaptionedSource(captioned, quarantine)


def is_judged_by_its_reward(config: LoopConfig) -> bool:
    """Return whether the held-out score also trains, through pairs or online, and so is no independent measure."""
    score = SHAPES_CHECK if config.data.kind == "shapes" else config.reward.path
    # The default builder takes all pairs; a learned reward stands between the score and the methods after it.
    chooses = config.preference.builder != PreferenceConfig.builder or bool(config.align.unlearned)
    return bool(chooses and config.reward.path == score and score and not config.evaluation.reward.path)


def open_stream(config: LoopConfig, model: str) -> RecordStream:
    """Open what data=records streams, tried for every stage and resolution. ValueError naming what is wrong."""
    data = config.data
    sources = {name: source.absolute() for name, source in data.records().items()}
    quarantine = config.directory.resolve() / "quarantine"
    tasks = {name: task_of(name, source, quarantine) for name, source in sources.items()}
    stream = RecordStream(
        sources=sources,
        tasks=tasks,
        quarantine=quarantine,
        held_out_fraction=data.held_out_fraction,
        max_bad_fraction=data.max_bad_fraction,
        block=data.block,
        max_tokens=data.max_tokens,
        seen_pixels=data.seen_pixels,
        packs=data.pack,
        workers=data.workers,
        encoded=Path(data.encoded).resolve() if data.encoded is not None else None,
        tokenizer_checksum=_tokenizer_checksum(model) if data.encoded is not None else "",
    )
    chat = markup_for(model, load_config(model))
    used: set[str] = set()
    for stage, resolution in supervised_stages(config):
        settings = getattr(config.at_resolution(resolution), stage.block)
        share = settings.drawing_share if isinstance(settings, SupervisedStage) else 1.0
        wanted = EDITS if stage.learns is Learns.EDITS else None
        rows = settings.recipe.micro_batch
        try:
            mixture = stream.at(resolution, share, wanted).mixture(chat, rows, 0, 0, config.learner.ranks)
            used |= mixture.sources.keys()
        except ValueError as error:
            raise ValueError(f"data.sources, for {stage.name} at {resolution} px: {error}") from error
    if idle := sources.keys() - used:
        told = ", ".join(f"{name} ({tasks[name]})" for name in sorted(idle))
        raise ValueError(f"data.sources: no stage of stages={config.stages} learns from {told}")
    return stream


def _tokenizer_checksum(model: str) -> str:
    """Return the checksum of a model's image tokenizer, which encoded features must have been made with."""
    return tokenizer_checksum(load_image_tokenizer(Path(model)).state_dict())


def supervised_stages(config: LoopConfig) -> list[tuple[Stage, int]]:
    """Return the stages of a run that learn from records, each with its resolutions."""
    found = []
    for stage in stages_of(config.stages):
        if (
            stage.learns in (Learns.DRAWINGS, Learns.QUESTIONS, Learns.EDITS)
            and stage.name not in config.align.left_out
        ):
            found += [(stage, resolution) for resolution in stage.resolutions(config.resolutions)]
    return found


def records_source(
    config: LoopConfig, stream: RecordStream, prompts: list[Prompt], quarantine: Quarantine
) -> RecordsSource:
    """Return the source of the iterations' prompts and winners. ValueError naming what is missing."""
    if ALIGN not in config.stages:
        return RecordsSource([], None, [], quarantine)
    sizes = [config.at_resolution(resolution).evaluation for resolution in config.resolutions]
    count = max(max(size.prompts, size.grid) for size in sizes)
    held_out = held_out_of(stream, count, config.directory / "held_out")
    winners = config.preference.winners
    return RecordsSource(prompts, Path(winners) if winners else None, held_out, quarantine)
