"""The stage table: what each stage of the papers trains, on what, with which losses (VARGPT-v1.1, section 3.2, Fig. 5).

A stage of a run is a row here and a block of settings of the same name in ``configs.schema.LoopConfig``. The driver,
the settings, the memory plan and the report read the rest from the row.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum, auto

from torch import nn

from vargpt_rl.losses.supervised import Noise
from vargpt_rl.model.adapter import AdapterConfig
from vargpt_rl.model.parts import DECODER, LANGUAGE, PROJECTORS, VISION, VISION_PROJECTOR
from vargpt_rl.model.unified import Unified

LANGUAGE_INPUTS = "language_inputs"
"""Name by which a user freezes all that the language model reads of images, so that it needs no backward pass."""
_LANGUAGE_INPUTS = (
    "projector_in.",
    "image_decoder.word_embedding.",
    # v1.1's condition without its modulation
    "image_decoder.condition.start_embedding",
    "image_decoder.condition.start_position",
    "image_decoder.condition.unconditional",
    "image_decoder.condition.norm.",
    "image_decoder.condition.pool.",
    # v1
    "image_decoder.class_embedding.",
    "image_decoder.places.",
)
UNREACHED = "image_decoder.condition.pool.query"
"""Kept for released checkpoints only: the pool has a single key, so no loss of any stage depends on its query."""
NO_NOISE = Noise(flip=0.0, condition_drop=0.0, drop_path=0.0)
ALIGN = "align"
"""Name, in a run's ``stages``, of the iterations: all rows whose ``at`` is `At.ITERATIONS`."""


class Learns(StrEnum):
    """Data of a stage."""

    IMAGES = auto()
    DRAWINGS = auto()
    QUESTIONS = auto()
    """Questions about images, and the share of drawings that the stage's settings ask for."""
    EDITS = auto()
    WINNERS = auto()
    PAIRS = auto()


class At(StrEnum):
    """Place of a stage in a run, which is also its resolution."""

    FIRST = auto()
    """Before the iterations, at the first of ``resolutions``."""
    ITERATIONS = auto()
    """In each iteration, at its resolution."""
    LAST = auto()
    """After the iterations, at the last of ``resolutions``."""
    NOWHERE = auto()
    """Not in a run: used by a program of its own."""


class Measure(StrEnum):
    """Held-out measure of what a stage is for. The value names it in the report."""

    RECONSTRUCTIONS = "reconstructions"
    DRAWINGS = "drawings"
    QUESTIONS = "questions answered"
    EDITS = "edits"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A row of the stage table."""

    name: str
    trains: tuple[str | tuple[str, ...], ...]
    """Prefixes of the names of parameters that train; a nested tuple holds those of one part in each family."""
    frozen: tuple[str, ...] = ()
    """Prefixes among these of parameters that do not train."""
    learns: Learns
    text_weight: float = 0.0
    """Weight of the text loss beside the image loss; 0 leaves the text head out."""
    noise: Noise = NO_NOISE
    at: At = At.ITERATIONS
    measure: Measure | None = None
    """Measured after a stage outside the iterations."""
    seed_offset: int = 0
    """Added to the run's seed to choose the stage's records."""
    settings: str = ""
    """Block of ``LoopConfig`` with the recipe, if it is not the stage's name."""

    @property
    def block(self) -> str:
        """The block of ``LoopConfig`` with the stage's settings."""
        return self.settings or self.name

    def resolutions(self, of_run: Sequence[int]) -> list[int]:
        """Return the resolutions at which the stage trains in a run with these."""
        chosen = {At.FIRST: of_run[:1], At.ITERATIONS: of_run, At.LAST: of_run[-1:], At.NOWHERE: ()}
        return list(dict.fromkeys(chosen[self.at]))

    def without(self, parts: Sequence[str]) -> "Stage":
        """Return the stage with ``parts`` frozen too. ValueError if it does not train one, or if none is left.

        `LANGUAGE_INPUTS` is a part of stages that do not train the language model.
        """
        own = {trained: _names(trained) for trained in self.trains}
        known = [name for names in own.values() for name in names]
        if not set(LANGUAGE) & set(self.trains):
            known.append(LANGUAGE_INPUTS)
        if unknown := [part for part in parts if part not in known]:
            raise ValueError(f"{unknown} cannot be frozen in stage {self.name}: expected some of {known}")
        frozen = _LANGUAGE_INPUTS if LANGUAGE_INPUTS in parts else self.frozen
        left = tuple(trained for trained, names in own.items() if not set(names) & set(parts) and trained not in frozen)
        if not left:
            raise ValueError(f"freezing {list(parts)} leaves nothing to train in stage {self.name}")
        return replace(self, trains=left, frozen=frozen)


def _names(trained: str | tuple[str, ...]) -> list[str]:
    """Return the names by which a user refers to a part: its prefix in each family, without the dot."""
    return [prefix.removesuffix(".") for prefix in ([trained] if isinstance(trained, str) else trained)]


# `edit` trains all parameters, as the paper has it, except those that its loss cannot reach: the image tokenizer, whose
# tokens are a choice without a gradient, and those that the model lists as `unreached`.
_ROWS = (
    Stage(
        name="base",  # makes the tiny model that stands in for the papers' starting points
        trains=(*LANGUAGE, VISION, *PROJECTORS, *DECODER),
        learns=Learns.QUESTIONS,
        text_weight=1.0,
        noise=Noise(flip=0.1, drop_path=0.0),
        at=At.NOWHERE,
    ),
    Stage(
        name="tokenizer",
        trains=("image_tokenizer.",),
        learns=Learns.IMAGES,
        at=At.FIRST,
        measure=Measure.RECONSTRUCTIONS,
    ),
    Stage(
        name="pretrain",
        trains=PROJECTORS,
        learns=Learns.DRAWINGS,
        noise=Noise(drop_path=0.0),
        at=At.FIRST,
        measure=Measure.DRAWINGS,
    ),
    Stage(
        name="understanding",
        trains=(*LANGUAGE, VISION_PROJECTOR),
        learns=Learns.QUESTIONS,
        text_weight=1.0,
        noise=Noise(drop_path=0.0),
        at=At.FIRST,
        measure=Measure.QUESTIONS,
        seed_offset=1,
    ),
    Stage(name="sft", trains=(*DECODER, *PROJECTORS), learns=Learns.DRAWINGS, noise=Noise()),
    Stage(name="dpo", trains=(*DECODER, *PROJECTORS), learns=Learns.PAIRS),
    Stage(  # the control of DPO
        name="sft_on_winners",
        trains=(*DECODER, *PROJECTORS),
        learns=Learns.WINNERS,
        settings="dpo",
    ),
    Stage(
        name="edit",
        trains=(*LANGUAGE, VISION, *PROJECTORS, *DECODER),
        learns=Learns.EDITS,
        text_weight=1.0,
        noise=Noise(),
        at=At.LAST,
        measure=Measure.EDITS,
        seed_offset=2,
    ),
)
STAGES: dict[str, Stage] = {stage.name: stage for stage in _ROWS}
RUN_STAGES: tuple[str, ...] = tuple(
    dict.fromkeys(ALIGN if s.at is At.ITERATIONS else s.name for s in _ROWS if s.at is not At.NOWHERE)
)
"""Values of ``stages``, in the order in which a run goes through them."""


def stages_of(run: Sequence[str]) -> list[Stage]:
    """Return the rows of a run's ``stages``; ``align`` stands for those of the iterations."""
    return [stage for stage in _ROWS if (ALIGN if stage.at is At.ITERATIONS else stage.name) in run]


def freeze(model: Unified, stage: Stage, adapter: AdapterConfig | None = None) -> list[str]:
    """Let only the stage's parameters train, if a loss can reach them; return their names, sorted.

    With an ``adapter``, which the model has, only what of it and its full parts is the stage's. ValueError if a prefix
    matches no parameter, or if the adapter leaves nothing to train.
    """
    for prefix in stage.trains:
        if not any(name.startswith(prefix) for name, _ in model.named_parameters()):
            raise ValueError(f"stage {stage.name}: no parameter's name starts with {prefix!r}")
    trained = []
    for name, parameter in model.named_parameters():
        reached = not name.startswith((UNREACHED, *stage.frozen, *model.unreached))
        allowed = adapter is None or adapter.trains(name)
        parameter.requires_grad_(allowed and reached and any(name.startswith(prefix) for prefix in stage.trains))
        if parameter.requires_grad:
            trained.append(name)
    if adapter is not None and not trained:
        raise ValueError(
            f"adapter.targets={adapter.targets} adapter.full={adapter.full}: nothing of stage {stage.name}, expected "
            f"some of {[name for trained in stage.trains for name in _names(trained)]}"
        )
    return sorted(trained)


def feeds_language_model(trained: Iterable[str]) -> bool:
    """Tell whether the language model needs a backward pass: one of these parameters is in it or feeds it."""
    return any(name.startswith(("model.", *_LANGUAGE_INPUTS)) and name != UNREACHED for name in trained)


def frozen_parts(model: nn.Module) -> list[str]:
    """Return the names of the largest parts of a model that do not train."""
    found = [name for name, parameter in model.named_parameters(recurse=False) if not parameter.requires_grad]
    for name, part in model.named_children():
        trains = [parameter.requires_grad for parameter in part.parameters()]
        if any(trains):
            found += [f"{name}.{inner}" for inner in frozen_parts(part)]
        elif trains:
            found.append(name)
    return sorted(found)
