"""What a run is given besides settings: a starting model, data, plug-ins. All checked before any worker starts."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLConfig

from configs.schema import LoopConfig, PreferenceConfig, RewardConfig
from vargpt_rl.common.plugins import BUILDER, make_plugin
from vargpt_rl.data.quarantine import Quarantine
from vargpt_rl.data.records.align import RecordsSource, held_out_of
from vargpt_rl.data.records.loading import EDITS, RecordStream, task_of
from vargpt_rl.data.samples import Prompt
from vargpt_rl.data.sources import (
    CaptionedConfig,
    CaptionedSource,
    ShapesConfig,
    ShapesSource,
    Source,
    prompts_from_file,
)
from vargpt_rl.model.families import load_config, markup_for
from vargpt_rl.model.hub import TINY_V1, check_model
from vargpt_rl.release.tiny_v1 import make_fresh_v1

SHAPES_CHECK = "rewards.shapes:shapes_reward"
"""The reward that is the shapes world's own measure."""


@dataclass(frozen=True)
class Inputs:
    """``prompts``: those of a file, or None where the source's own are used; ``reward`` None scores nothing.

    ``judge``: what held-out drawings are scored by and pairs are not, if there is one. ``lines`` is how many records
    the data has, if they can be bad, and ``max_bad_fraction`` how many of them may be. ``feed``: what supervised stages
    stream, or None where ``source`` has records to choose from.
    """

    model: str
    source: Source
    quarantine: Quarantine
    builder: Callable
    reward: Callable | None
    prompts: list[Prompt] | None
    lines: int
    max_bad_fraction: float
    feed: RecordStream | None = None
    judge: Callable | None = None

    def check_quarantine(self) -> None:
        """ValueError, with the counts by reason, when too many records are lost."""
        if self.lines:
            self.quarantine.check(self.lines, self.max_bad_fraction)


def check_resolutions(model: str, resolutions: list[int]) -> None:
    """ValueError for a resolution that the model of this directory does not draw."""
    tokenizer = load_config(model).image_tokenizer_config
    try:
        for resolution in resolutions:
            tokenizer.schedule_for(resolution)
    except ValueError as error:
        raise ValueError(f"resolutions={list(resolutions)}: {error}") from error


def make_reward(config: RewardConfig) -> Callable | None:
    """The reward that the settings name, if any. ValueError where it cannot be made."""
    return make_plugin(config.path, dict(config.options)) if config.path else None


def make_builder(path: str, options: dict[str, object], rewarded: bool) -> Callable:
    """A preference builder with its options, tried without samples. ValueError where it refuses, naming both."""
    builder = make_plugin(path, options, BUILDER)
    rewards = ([], {}) if rewarded else (None, None)
    try:
        builder([], {}, *rewards)
    except (TypeError, ValueError) as error:
        raise ValueError(f"preference.builder={path} preference.options={options}: {error}") from error
    return builder


def gather(config: LoopConfig) -> Inputs:
    """Read and check everything the settings name. ValueError naming the key or file for whatever is wrong."""
    if config.checkpoint == TINY_V1:
        model = str(make_fresh_v1(config.directory / "start", config.resolutions[0], config.seed))
    else:
        model = check_model(config.checkpoint)
    check_resolutions(model, config.resolutions)
    if config.rollout.uses_vllm and not isinstance(load_config(model), Qwen2VLConfig):
        raise ValueError("rollout.text_engine: vllm serves models of type 'vargpt' alone; expected transformers")
    reward, judge = make_reward(config.reward), make_reward(config.evaluation.reward)
    builder = make_builder(config.preference.builder, dict(config.preference.options), reward is not None)
    quarantine = Quarantine(config.directory / "quarantine.jsonl")
    prompts = prompts_from_file(Path(config.preference.prompts), quarantine) if config.preference.prompts else None
    feed = None
    if config.data.kind == "shapes":
        source: Source = ShapesSource(ShapesConfig())
    elif config.data.kind == "records":
        feed = make_feed(config, model)
        source, prompts = records_source(config, feed, prompts or [], quarantine), None
    else:
        source = CaptionedSource(
            CaptionedConfig(
                captions=config.data.captions,
                images=config.data.images,
                winners=config.preference.winners,
                held_out_fraction=config.data.held_out_fraction,
            ),
            quarantine,
        )
    bad = config.data.max_bad_fraction
    inputs = Inputs(model, source, quarantine, builder, reward, prompts, source.lines, bad, feed, judge)
    inputs.check_quarantine()
    if is_judged_by_its_reward(config):
        print("note: held-out images are scored by the very reward that makes the pairs; evaluation.reward.path=... "
              "names another", file=sys.stderr)  # fmt: skip
    return inputs


def is_judged_by_its_reward(config: LoopConfig) -> bool:
    """Whether the held-out score of drawings is what chooses the pairs, and so no independent measure."""
    score = SHAPES_CHECK if config.data.kind == "shapes" else config.reward.path
    chooses = config.preference.builder != PreferenceConfig.builder  # which takes all, whatever their rewards
    return bool(chooses and config.reward.path == score and score and not config.evaluation.reward.path)


def make_feed(config: LoopConfig, model: str) -> RecordStream:
    """What data=records streams, tried for every stage and resolution of the run. ValueError naming what is wrong."""
    data = config.data
    sources = {name: source.absolute() for name, source in data.records().items()}
    quarantine = config.directory.resolve() / "quarantine"
    tasks = {name: task_of(name, source, quarantine) for name, source in sources.items()}
    encoded, checksum = None, ""
    if data.encoded is not None:
        from vargpt_rl.data.features import load_image_tokenizer, tokenizer_checksum

        encoded = Path(data.encoded).resolve()
        checksum = tokenizer_checksum(load_image_tokenizer(Path(model)).state_dict())
    feed = RecordStream(
        sources, tasks, quarantine, data.held_out_fraction, data.max_bad_fraction, data.block, data.max_tokens,
        data.seen_pixels, data.pack, data.workers, encoded, checksum,
    )  # fmt: skip
    chat = markup_for(model, load_config(model))
    used: set[str] = set()
    for stage, resolution, share in supervised_stages(config):
        rows = getattr(config.at_resolution(resolution), stage).recipe.micro_batch
        wanted = EDITS if stage == "edit" else None
        try:
            mixture = feed.at(resolution, share, wanted).mixture(chat, rows, 0, 0, config.learner.ranks)
            used |= mixture.ingredients.keys()
        except ValueError as error:
            raise ValueError(f"data.sources, for {stage} at {resolution} px: {error}") from error
    if idle := sources.keys() - used:
        told = ", ".join(f"{name} ({tasks[name]})" for name in sorted(idle))
        raise ValueError(f"data.sources: no stage of stages={config.stages} learns from {told}")
    return feed


def supervised_stages(config: LoopConfig) -> list[tuple[str, int, float]]:
    """The stages of a run that stream records: name, resolution, share of drawings."""
    first = config.resolutions[0]
    shares = {"pretrain": 1.0, "understanding": config.at_resolution(first).understanding.drawing_share}
    found = [(stage, first, shares[stage]) for stage in config.stages if stage in shares]
    found += [("sft", px, 1.0) for px in dict.fromkeys(config.resolutions) if "align" in config.stages]
    return found + [("edit", config.resolutions[-1], 1.0)] * ("edit" in config.stages)


def records_source(
    config: LoopConfig, feed: RecordStream, prompts: list[Prompt], quarantine: Quarantine
) -> RecordsSource:
    """What the iterations draw and compare, where there are iterations. ValueError naming what is missing."""
    if "align" not in config.stages:
        return RecordsSource([], None, [], quarantine)
    sizes = [config.at_resolution(resolution).evaluation for resolution in config.resolutions]
    count = max(max(size.prompts, size.grid) for size in sizes)
    held_out = held_out_of(feed, count, config.directory / "held_out")
    return RecordsSource(prompts, Path(config.preference.winners), held_out, quarantine)
