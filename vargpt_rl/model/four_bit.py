"""Frozen parts of a model in 4 bits (QLoRA, arXiv 2305.14314), by bitsandbytes: NF4 with doubly quantised scales.

A layer's weight is dequantised to the dtype of its inputs whenever it is used, so a pass needs no more memory than the
largest such weight. Learner and rollout workers quantise alike, so that both score with the same weights.
"""

from collections.abc import Sequence

import torch
from torch import nn

from vargpt_rl.model.parts import PARTS

BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight: 4 bits, a scale of 8 bits for each block of 64, and one of fp32 for each 256 of these."""


_QUANTISED = {"language_model": PARTS["language_model"][:1], "image_decoder": ("image_decoder.blocks.",)}
"""Prefixes of what is held in 4 bits of parts that are not held so as a whole."""


def four_bit_layers(model: nn.Module, parts: Sequence[str]) -> list[str]:
    """Return the names of the linear layers of parts that are held in 4 bits, in a model with or without an adapter.

    The text head is left out, because some checkpoints tie it to the embedding, and so are the decoder's layers outside
    its blocks: its embedding, condition and head.
    """
    prefixes = tuple(prefix for part in parts for prefix in _QUANTISED.get(part, PARTS[part]))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(prefixes) and ".lora_" not in name
    ]


def quantise(model: nn.Module, parts: Sequence[str], device: str) -> None:
    """Replace the linear layers of parts by ones in 4 bits, one after the other, on ``device``.

    All other tensors stay where they are.
    """
    if not parts:
        return
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name in four_bit_layers(model, parts):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)  # see `four_bit_layers`
        with torch.device("meta"):
            small = Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None, linear.weight.dtype, quant_type="nf4"
            )
        small.weight = Params4bit(linear.weight.data, quant_type="nf4", module=small).to(device)
        if linear.bias is not None:
            small.bias = nn.Parameter(linear.bias.data, requires_grad=False)
        parent, _, own = name.rpartition(".")
        small.support_avx512bf16_for_cpu = False  # else evaluation alone rounds to bf16 there, and training differs
        setattr(model.get_submodule(parent), own, small)
