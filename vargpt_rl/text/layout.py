"""The language half of a checkpoint: which tensors belong to it, and which of them vLLM fuses into one layer."""

import re
from collections.abc import Iterable, Mapping

_HALF = ("model.", "visual.", "lm_head.")
"""Prefixes of ``model.language_model.``, ``model.visual.`` and ``lm_head.``, and of older Qwen2-VL checkpoints."""

_FUSED = re.compile(r"(q_proj|k_proj|v_proj|gate_proj|up_proj)$")
_PLACE = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}


def is_text(name: str) -> bool:
    """Tell whether a tensor belongs to the language model, its head or the vision tower."""
    return name.startswith(_HALF)


def layer_of(name: str) -> str:
    """Return the name of vLLM's layer that contains a tensor."""
    return _FUSED.sub(lambda part: _PLACE.get(part[0], "gate_up_proj"), name.rpartition(".")[0])


def check_set(shapes: Mapping[str, tuple[int, ...]], model: Mapping[str, tuple[int, ...]]) -> None:
    """Check that tensors of these shapes can be swapped into a model: known names, equal shapes, whole layers.

    Raises ValueError naming the first that cannot.
    """
    for name, shape in shapes.items():
        if name not in model:
            raise ValueError(f"{name}: the model has no such tensor")
        if tuple(shape) != tuple(model[name]):
            raise ValueError(f"{name} has shape {tuple(shape)}, expected {tuple(model[name])}")
    layers = set(map(layer_of, shapes))
    if missing := _first(name for name in model if layer_of(name) in layers and name not in shapes):
        raise ValueError(f"{missing} is missing: the set has other tensors of layer {layer_of(missing)}")


def _first(names: Iterable[str]) -> str | None:
    return min(names, default=None)
