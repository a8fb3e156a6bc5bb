"""The stage table: what each stage of the papers trains, with which losses (VARGPT-v1.1, section 3.2, Fig. 5).

``base`` makes the tiny model that stands in for the papers' starting points; ``sft_on_winners`` is the control of DPO.

``edit`` trains all parameters, as the paper has it, but for those that its loss cannot reach: the image tokenizer,
whose bits are a threshold without a gradient, and ``UNREACHED``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from vargpt_rl.losses import Noise

PROJECTORS = ("projector_in.", "projector_out.")
DECODER = ("image_decoder.",)
LANGUAGE = ("model.language_model.", "lm_head.")
VISION_PROJECTOR = ("model.visual.merger.",)
UNREACHED = "image_decoder.condition.pool.query"
"""Kept for released checkpoints only: the pool has a single key, so no loss of any stage depends on its query."""
NO_NOISE = Noise(flip=0.0, condition_drop=0.0, drop_path=0.0)


@dataclass(frozen=True)
class Stage:
    """``trains``: prefixes of parameter names, all else is frozen. ``text_weight`` 0 leaves the text head out."""

    name: str
    trains: tuple[str, ...]
    text_weight: float
    noise: Noise

    def without(self, parts: Sequence[str]) -> "Stage":
        """The stage with some of its parts frozen too. ValueError for what it does not train, or if nothing is left."""
        own = [prefix.removesuffix(".") for prefix in self.trains]
        if unknown := [part for part in parts if part not in own]:
            raise ValueError(f"{unknown} cannot be frozen in stage {self.name}: expected some of {own}")
        left = tuple(prefix for prefix in self.trains if prefix.removesuffix(".") not in parts)
        if not left:
            raise ValueError(f"freezing {list(parts)} leaves nothing to train in stage {self.name}")
        return replace(self, trains=left)


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("base", (*LANGUAGE, "model.visual.", *PROJECTORS, *DECODER), 1.0, Noise(flip=0.1, drop_path=0.0)),
        Stage("pretrain", PROJECTORS, 0.0, Noise(drop_path=0.0)),
        Stage("understanding", (*LANGUAGE, *VISION_PROJECTOR), 1.0, Noise(drop_path=0.0)),
        Stage("sft", (*DECODER, *PROJECTORS), 0.0, Noise()),
        Stage("sft_on_winners", (*DECODER, *PROJECTORS), 0.0, NO_NOISE),
        Stage("edit", (*LANGUAGE, "model.visual.", *PROJECTORS, *DECODER), 1.0, Noise()),
        Stage("dpo", (*DECODER, *PROJECTORS), 0.0, NO_NOISE),
    )
}


def freeze(model: nn.Module, stage: Stage) -> list[str]:
    """Let only the stage's parameters train, if a loss can reach them; their names, sorted.

    ValueError if a prefix fits none.
    """
    for prefix in stage.trains:
        if not any(name.startswith(prefix) for name, _ in model.named_parameters()):
            raise ValueError(f"stage {stage.name}: no parameter's name starts with {prefix!r}")
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(stage.trains) and name != UNREACHED)
        if parameter.requires_grad:
            trained.append(name)
    return sorted(trained)


def frozen_parts(model: nn.Module) -> list[str]:
    """The largest parts of a model that do not train, by name."""
    found = [name for name, parameter in model.named_parameters(recurse=False) if not parameter.requires_grad]
    for name, part in model.named_children():
        trains = [parameter.requires_grad for parameter in part.parameters()]
        if any(trains):
            found += [f"{name}.{inner}" for inner in frozen_parts(part)]
        elif trains:
            found.append(name)
    return sorted(found)
