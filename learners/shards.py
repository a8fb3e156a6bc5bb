"""Trained weights and their optimizer states in training checkpoints: saved by shards, loaded by any number of ranks.

Each rank writes the fp32 weights and AdamW moments that it owns under DeepSpeed's ZeRO, tensor by tensor, without
communication. Loading reads just the elements that a rank owns then, so that the number of ranks and the ZeRO stage may
differ. For equal ones the values are the same bit for bit. Files are safetensors, whose names are
``KIND/FIRST_ELEMENT/TENSOR`` of flattened tensors.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors import safe_open
from safetensors.torch import load_file, save_file

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of each weight."""
FILE_BYTES = 2**30
"""Size of a file beyond which a rank begins another, which bounds the memory of saving."""


@dataclass(frozen=True)
class Shard:
    """Elements of a trained tensor that this rank owns: ``count`` from ``first`` on.

    They lie from ``offset`` on in the optimizer's fp32 tensor ``flat``.
    """

    tensor: str
    first: int
    flat: torch.Tensor
    offset: int
    count: int

    def view_of(self, flat: torch.Tensor) -> torch.Tensor:
        """Return this shard of a tensor that has the layout of ``flat``, as a view."""
        return flat.data.view(-1).narrow(0, self.offset, self.count)

    def values(self, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        """Return views of the fp32 weights and, if there is one for each, of their moments."""
        state = optimizer.state[self.flat]
        found = {"weight": self.view_of(self.flat)}
        return found | {moment: self.view_of(state[moment]) for moment in MOMENTS if moment in state}


def owned_shards(engine: DeepSpeedEngine) -> list[Shard]:
    """Return the shards of all trained tensors that this rank owns. Without ZeRO, each rank owns everything."""
    trained = {name: each for name, each in engine.module.named_parameters() if each.requires_grad}
    optimizer: Any = engine.optimizer
    found = []
    match int(engine.zero_optimization_stage()):
        case 0:
            masters = {id(parameter): master for parameter, master in _masters(optimizer)}
            for name, parameter in trained.items():
                found.append(Shard(name, 0, masters[id(parameter)], 0, parameter.numel()))
        case 1 | 2:
            for name, parameter in trained.items():
                if (mapping := parameter._hp_mapping) is not None:
                    flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                    place = mapping.hp_fragment_address
                    found.append(Shard(name, mapping.lp_fragment_address.start, flat, place.start, place.numel))
        case 3:
            for name, parameter in trained.items():
                group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
                first = size * engine.global_rank
                if first < parameter.ds_numel:  # the last ranks may have nothing but padding
                    flat = optimizer.fp32_partitioned_groups_flat[group]
                    found.append(Shard(name, first, flat, offset, min(size, parameter.ds_numel - first)))
    return found


def _masters(optimizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the model's parameters with their fp32 copies, without ZeRO: the same tensors in fp32."""
    if isinstance(optimizer, torch.optim.Optimizer):
        yield from ((each, each) for group in optimizer.param_groups for each in group["params"])
    else:
        for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            yield from zip(group, masters, strict=True)


def save_shards(engine: DeepSpeedEngine, folder: Path) -> None:
    """Write what this rank owns into ``folder``; without ZeRO, the first rank writes everything."""
    if engine.zero_optimization_stage() == 0 and engine.global_rank > 0:
        return
    files = 0
    held: dict[str, torch.Tensor] = {}
    for shard in owned_shards(engine):
        for kind, view in shard.values(engine.basic_optimizer).items():
            held[f"{kind}/{shard.first}/{shard.tensor}"] = view.to("cpu", copy=True)
        if sum(each.nbytes for each in held.values()) > FILE_BYTES:
            save_file(held, _file(folder, engine.global_rank, files))
            files += 1
            held = {}
    save_file(held, _file(folder, engine.global_rank, files))
    if whole := _whole_states(engine):
        save_file(whole, _whole_file(folder, engine.global_rank))


def _whole_states(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Return copies of states that cannot be split by element, such as moments of 8 bits, by tensor and key."""
    found = {}
    for number, flat in enumerate(_all_flat(engine)):
        state = engine.basic_optimizer.state[flat]
        if not state.keys() >= set(MOMENTS):
            tensors = {key: value for key, value in state.items() if torch.is_tensor(value)}
            found |= {f"{number}/{key}": value.to("cpu", copy=True) for key, value in tensors.items()}
    return found


def _whole_file(folder: Path, rank: int) -> Path:
    return folder / f"whole-{rank:05d}.safetensors"


def _file(folder: Path, rank: int, number: int) -> Path:
    return folder / f"state-{rank:05d}-{number:03d}.safetensors"


def updates(engine: DeepSpeedEngine) -> int:
    """Return the number of updates that AdamW has made."""
    return int(next(iter(engine.basic_optimizer.state.values()))["step"])


class _Stored(NamedTuple):
    first: int
    size: int
    file: Any
    name: str


class SavedShards:
    """The shards of all ranks in a checkpoint."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._stored: dict[tuple[str, str], list[_Stored]] = defaultdict(list)
        for path in sorted(folder.glob("state-*.safetensors")):
            file = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118, it is no dictionary
                kind, first, tensor = name.split("/", 2)
                size = file.get_slice(name).get_shape()[0]
                self._stored[kind, tensor].append(_Stored(int(first), size, file, name))

    def read(self, kind: str, tensor: str, first: int, count: int) -> torch.Tensor:
        """Return elements of a flattened tensor, fp32 [count]. ValueError if some are missing."""
        values = torch.empty(count)
        missing = count
        for stored in self._stored[kind, tensor]:
            begin = max(first, stored.first)
            end = min(first + count, stored.first + stored.size)
            if begin < end:
                found = stored.file.get_slice(stored.name)[begin - stored.first : end - stored.first]
                values[begin - first : end - first] = found
                missing -= end - begin
        if missing:
            raise ValueError(f"{self.folder}: {missing} of {count} elements of {tensor}, {kind}, are missing")
        return values


def load_weights(model: torch.nn.Module, saved: SavedShards) -> None:
    """Copy the trained weights into a model that no engine has taken over yet, rounded to its dtype."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            values = saved.read("weight", name, 0, parameter.numel())
            parameter.data.copy_(values.view(parameter.shape))


def load_shards(engine: DeepSpeedEngine, saved: SavedShards, updates: int, same_ranks: bool) -> None:
    """Load what this rank owns now into its optimizer, which has made ``updates`` updates.

    ValueError if there are states that cannot be split, unless the same ranks, with the same ZeRO stage, saved them.
    """
    optimizer = engine.basic_optimizer
    shards = owned_shards(engine)
    splits = isinstance(optimizer, torch.optim.AdamW)
    if splits:
        for flat in _all_flat(engine):
            _make_state(optimizer, flat)
            optimizer.state[flat]["step"].fill_(updates)
    else:
        _load_whole_states(engine, saved.folder, updates, same_ranks)
    for shard in shards:
        for kind, view in shard.values(optimizer).items():
            view.copy_(saved.read(kind, shard.tensor, shard.first, shard.count))


def _load_whole_states(engine: DeepSpeedEngine, folder: Path, updates: int, same_ranks: bool) -> None:
    if not same_ranks:
        raise ValueError(
            f"{folder}: the moments of {type(engine.basic_optimizer).__name__} are kept by rank: expected "
            "learner.ranks and zero as before, or optimizer=adamw from the start of the stage"
        )
    states: dict[int, dict[str, Any]] = defaultdict(lambda: {"step": updates})
    rank = engine.global_rank if engine.zero_optimization_stage() else 0
    for name, value in load_file(_whole_file(folder, rank)).items():
        number, key = name.split("/")
        states[int(number)][key] = value
    for number, flat in enumerate(_all_flat(engine)):
        own = {key: value.to(flat.device) if torch.is_tensor(value) else value for key, value in states[number].items()}
        engine.basic_optimizer.state[flat] = own


def _all_flat(engine: DeepSpeedEngine) -> Iterator[torch.Tensor]:
    """Yield all fp32 tensors of the optimizer, also those that are padding alone."""
    optimizer: Any = engine.optimizer
    match int(engine.zero_optimization_stage()):
        case 0:
            yield from (master for _, master in _masters(optimizer))
        case 1 | 2:
            yield from optimizer.single_partition_of_fp32_groups
        case 3:
            yield from optimizer.fp32_partitioned_groups_flat


def _make_state(optimizer: torch.optim.Optimizer, flat: torch.Tensor) -> None:
    """Let the optimizer create its state of a tensor by a step without gradient; loading overwrites what that does."""
    groups = optimizer.param_groups
    gradient = flat.grad  # offloaded, a buffer that stays
    optimizer.param_groups = [groups[0] | {"params": [flat]}]
    flat.grad = torch.zeros_like(flat)
    type(optimizer).step(optimizer)  # not the one that a schedule counts
    flat.grad = gradient
    optimizer.param_groups = groups
