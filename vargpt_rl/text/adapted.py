"""An adapter's tensors as whole layers of its base, for an engine that holds no adapter.

The product of the matrices is added to the base's own weights, read anew from its folder, so that repeated swaps do not
drift. vLLM reloads whole layers, and fuses q, k and v into one: a layer brings all of its base's tensors.

Shape legend: O outputs and I inputs of a linear layer, r rank.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from vargpt_rl.model.adapter import NAME, AdapterConfig, is_adapter, merged_weight
from vargpt_rl.storage.sharded import stored_in_folder
from vargpt_rl.text.layout import check_set, is_text, layer_of

CHUNK = 1 << 30
"""Bytes of merged layers in memory at once, unless one layer has more."""


class MergedLayers:
    """The base of an adapter, a model directory, and the layers that an engine no longer holds as the base has them."""

    def __init__(self, folder: str, config: AdapterConfig):
        self.scale = config.alpha / config.rank
        self._base = {name: stored for name, stored in stored_in_folder(Path(folder)).items() if is_text(name)}
        self._names: dict[str, list[str]] = defaultdict(list)
        for name in self._base:
            self._names[layer_of(name)].append(name)
        self._changed: set[str] = set()

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """ValueError, naming the first, for tensors that are neither matrices of a weight of the base nor its own."""
        own = {name: stored.shape for name, stored in self._base.items()}
        check_set({name: shape for name, shape in shapes.items() if not is_adapter(name)}, own)
        for module in _modules(shapes):
            pair = [f"{module}.lora_{side}.{NAME}.weight" for side in "AB"]
            target = f"{module}.weight"
            if target not in own or not shapes.keys() >= set(pair):
                raise ValueError(f"{module}: expected a pair of matrices of a weight {target} of the base")
            found = (shapes[pair[1]][0], shapes[pair[0]][1])
            if found != tuple(own[target]):
                raise ValueError(f"{module}: matrices of a layer {found}, the base has {tuple(own[target])}")

    def chunks(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """Yield tensors of the base's names for a set: its own ones, and whole layers with their matrices merged.

        Layers that the matrices do not change are left out as long as none has changed them.
        """
        if plain := {name: tensor for name, tensor in tensors.items() if not is_adapter(name)}:
            yield plain
        modules: dict[str, list[str]] = defaultdict(list)
        for module in _modules(tensors):
            modules[layer_of(f"{module}.weight")].append(module)
        found: dict[str, torch.Tensor] = {}
        for layer, adapted in modules.items():
            if layer not in self._changed and not any(_pair(tensors, module)[1].any() for module in adapted):
                continue
            self._changed.add(layer)
            found.update(self._layer(layer, adapted, tensors))
            if sum(tensor.nbytes for tensor in found.values()) >= CHUNK:
                yield found
                found = {}
        if found:
            yield found

    def _layer(
        self, layer: str, adapted: list[str], tensors: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of a layer by name, with matrices of the modules ``adapted`` merged."""
        for name in self._names[layer]:
            base_OI = self._base[name].read()
            module = name.removesuffix(".weight")
            if module in adapted:
                a_rI, b_Or = _pair(tensors, module)
                base_OI = merged_weight(base_OI, a_rI, b_Or, self.scale)
            yield name, base_OI


def _modules(names: Mapping[str, object]) -> list[str]:
    """Return the names of the layers that an adapter's tensors belong to."""
    return list(dict.fromkeys(name.partition(".lora_")[0] for name in names if is_adapter(name)))


def _pair(tensors: Mapping[str, torch.Tensor], module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the matrices of a layer: [r, I] and [O, r]."""
    return tensors[f"{module}.lora_A.{NAME}.weight"], tensors[f"{module}.lora_B.{NAME}.weight"]
