"""The stage table: what each stage of the papers trains, with which losses (VARGPT-v1.1, section 3.2, Fig. 5).

``base`` makes the tiny model that stands in for the papers' starting points; ``sft_on_winners`` is the control of DPO.

``edit`` trains all parameters, as the paper has it, but for those that its loss cannot reach: the image tokenizer,
whose tokens are a choice without a gradient, and what the model knows to be ``unreached``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from vargpt_rl.losses.supervised import Noise

PROJECTORS = ("projector_in.", "projector_out.")
DECODER = ("image_decoder.",)
LANGUAGE = ("model.language_model.", "lm_head.")
# Of v1.1 and v1, whose language-and-vision models differ in these names.
VISION = ("model.visual.", "model.vision_tower.", "model.multi_modal_projector.")
VISION_PROJECTOR = ("model.visual.merger.", "model.multi_modal_projector.")
UNREACHED = "image_decoder.condition.pool.query"
"""Kept for released checkpoints only: the pool has a single key, so no loss of any stage depends on its query."""
NO_NOISE = Noise(flip=0.0, condition_drop=0.0, drop_path=0.0)


def _names(trained: str | tuple[str, ...]) -> list[str]:
    """The part that a prefix, or each family's prefixes of it, stands for, as a user names it."""
    return [prefix.removesuffix(".") for prefix in ([trained] if isinstance(trained, str) else trained)]


@dataclass(frozen=True)
class Stage:
    """``trains``: prefixes of parameter names, all else is frozen; a tuple holds those of one part in each family.

    ``text_weight`` 0 leaves the text head out.
    """

    name: str
    trains: tuple[str | tuple[str, ...], ...]
    text_weight: float
    noise: Noise

    def without(self, parts: Sequence[str]) -> "Stage":
        """The stage with some of its parts frozen too. ValueError for what it does not train, or if nothing is left."""
        own = {trained: _names(trained) for trained in self.trains}
        known = [name for names in own.values() for name in names]
        if unknown := [part for part in parts if part not in known]:
            raise ValueError(f"{unknown} cannot be frozen in stage {self.name}: expected some of {known}")
        left = tuple(trained for trained, names in own.items() if not set(names) & set(parts))
        if not left:
            raise ValueError(f"freezing {list(parts)} leaves nothing to train in stage {self.name}")
        return replace(self, trains=left)


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("base", (*LANGUAGE, VISION, *PROJECTORS, *DECODER), 1.0, Noise(flip=0.1, drop_path=0.0)),
        Stage("pretrain", PROJECTORS, 0.0, Noise(drop_path=0.0)),
        Stage("understanding", (*LANGUAGE, VISION_PROJECTOR), 1.0, Noise(drop_path=0.0)),
        Stage("sft", (*DECODER, *PROJECTORS), 0.0, Noise()),
        Stage("sft_on_winners", (*DECODER, *PROJECTORS), 0.0, NO_NOISE),
        Stage("edit", (*LANGUAGE, VISION, *PROJECTORS, *DECODER), 1.0, Noise()),
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
        reached = not name.startswith((UNREACHED, *getattr(model, "unreached", ())))
        parameter.requires_grad_(reached and any(name.startswith(prefix) for prefix in stage.trains))
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
