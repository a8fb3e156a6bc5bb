"""What a run is given besides settings: a starting model, data, plug-ins. All checked before any worker starts."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from configs.schema import TINY, LoopConfig
from vargpt_rl.data.quarantine import Quarantine
from vargpt_rl.data.sources import (
    CaptionedConfig,
    CaptionedSource,
    ShapesConfig,
    ShapesSource,
    Source,
    prompts_from_file,
)
from vargpt_rl.data.types import Prompt
from vargpt_rl.model.families import family_named
from vargpt_rl.model.hub import model_folder
from vargpt_rl.plugins import load_plugin, make_callable, make_plugin

EMBEDDED = Path(__file__).parent / "tiny"


@dataclass(frozen=True)
class Inputs:
    """``prompts``: those of a file, or None where the source's own are used; ``reward`` None scores nothing.

    ``lines`` is how many records the data has, if they can be bad, and ``max_bad_fraction`` how many of them may be.
    """

    model: str
    source: Source
    quarantine: Quarantine
    builder: Callable
    reward: Callable | None
    prompts: list[Prompt] | None
    lines: int
    max_bad_fraction: float

    def check_quarantine(self) -> None:
        """ValueError, with the counts by reason, when too many records are lost."""
        if self.lines:
            self.quarantine.check(self.lines, self.max_bad_fraction)


def check_model(path: str) -> str:
    """A model directory of this architecture, absolute; "org/name" is fetched from the hub (`model_folder`).

    ValueError naming what was found instead.
    """
    folder = EMBEDDED if path == TINY else model_folder(path)
    settings = folder / "config.json"
    if not settings.is_file():
        raise ValueError(f"checkpoint={path}: no config.json in {folder}")
    try:
        family_named(json.loads(settings.read_text()).get("model_type"))
    except ValueError as error:
        raise ValueError(f"checkpoint={path}: {error}") from error
    return str(folder)


def make_builder(path: str, options: dict[str, object], rewarded: bool) -> Callable:
    """A preference builder with its options, tried without samples. ValueError where it refuses, naming both."""
    builder = make_plugin(path, options)
    rewards = ([], {}) if rewarded else (None, None)
    try:
        builder([], {}, *rewards)
    except (TypeError, ValueError) as error:
        raise ValueError(f"preference.builder={path} preference.options={options}: {error}") from error
    return builder


def gather(config: LoopConfig) -> Inputs:
    """Read and check everything the settings name. ValueError naming the key or file for whatever is wrong."""
    model = check_model(config.checkpoint)
    reward = config.reward.path and make_callable(load_plugin(config.reward.path), dict(config.reward.options))
    builder = make_builder(config.preference.builder, dict(config.preference.options), reward is not None)
    quarantine = Quarantine(config.directory / "quarantine.jsonl")
    if config.data.kind == "shapes":
        source: Source = ShapesSource(ShapesConfig())
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
    prompts = prompts_from_file(Path(config.preference.prompts), quarantine) if config.preference.prompts else None
    lines = getattr(source, "lines", 0)
    inputs = Inputs(model, source, quarantine, builder, reward, prompts, lines, config.data.max_bad_fraction)
    inputs.check_quarantine()
    return inputs
