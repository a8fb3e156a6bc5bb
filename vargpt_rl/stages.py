"""The stage table: what each stage of the papers trains, with which losses (VARGPT-v1.1, section 3.2, Fig. 5).

``base`` makes the tiny model that stands in for the papers' starting points; ``sft_on_winners`` is the control of DPO.
"""

from dataclasses import dataclass

from torch import nn

from vargpt_rl.losses import Noise

PROJECTORS = ("projector_in.", "projector_out.")
DECODER = ("image_decoder.",)
LANGUAGE = ("model.language_model.", "lm_head.")
# Of v1.1 and v1, whose language-and-vision models differ in these names.
VISION = ("model.visual.", "model.vision_tower.")
VISION_PROJECTOR = ("model.visual.merger.", "model.multi_modal_projector.")
NO_NOISE = Noise(flip=0.0, condition_drop=0.0, drop_path=0.0)


@dataclass(frozen=True)
class Stage:
    """``trains``: prefixes of parameter names, all else is frozen; a tuple holds those of one part in each family.

    ``text_weight`` 0 leaves the text head out.
    """

    name: str
    trains: tuple[str | tuple[str, ...], ...]
    text_weight: float
    noise: Noise


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "base", (*LANGUAGE, VISION, VISION_PROJECTOR, *PROJECTORS, *DECODER), 1.0, Noise(flip=0.1, drop_path=0.0)
        ),
        Stage("pretrain", PROJECTORS, 0.0, Noise(drop_path=0.0)),
        Stage("understanding", (*LANGUAGE, VISION_PROJECTOR), 1.0, Noise(drop_path=0.0)),
        Stage("sft", (*DECODER, *PROJECTORS), 0.0, Noise()),
        Stage("sft_on_winners", (*DECODER, *PROJECTORS), 0.0, NO_NOISE),
        Stage("dpo", (*DECODER, *PROJECTORS), 0.0, NO_NOISE),
    )
}


def freeze(model: nn.Module, stage: Stage) -> list[str]:
    """Let only the stage's parameters train; their names, sorted. ValueError if a prefix fits none."""
    for prefix in stage.trains:
        if not any(name.startswith(prefix) for name, _ in model.named_parameters()):
            raise ValueError(f"stage {stage.name}: no parameter's name starts with {prefix!r}")
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(name.startswith(prefix) for prefix in stage.trains))
        if parameter.requires_grad:
            trained.append(name)
    return sorted(trained)
