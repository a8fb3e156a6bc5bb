"""Read the weights of published rewards: safetensors, or torch files that contain no code."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def read_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a file, by name. ValueError if it is missing or holds anything else."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such weights file")
    state = load_file(path) if path.endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    state = state.get("state_dict", state)
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise ValueError(f"{path}: expected tensors by name, but {odd[0]!r} is not a tensor")
    return state


def rename(name: str, patterns: Sequence[tuple[str, str]]) -> str:
    """Replace the first matching pattern in ``name``."""
    for pattern, other in patterns:
        name, count = re.subn(pattern, other, name)
        if count:
            break
    return name


def linear_head(state: dict[str, Tensor]) -> nn.Sequential:
    """The linear layers of a state in the order of their numbers, with nothing in between.

    In published heads only dropout lies between them. ValueError unless the layers fit together and end in one number.
    """
    weights = sorted((name for name in state if re.fullmatch(r"(.*\.)?weight", name)), key=_numbers)
    layers = []
    for name in weights:
        weight = state[name].float()
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": state[name.removesuffix("weight") + "bias"].float()})
        layers.append(layer)
    widths = [layer.out_features for layer in layers]
    if [layer.in_features for layer in layers[1:]] != widths[:-1] or widths[-1:] != [1]:
        raise ValueError(f"expected linear layers that end in one number, got {weights} with outputs {widths}")
    return nn.Sequential(*layers)


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]
