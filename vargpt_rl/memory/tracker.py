"""Count the memory of a computation without running it: the real code runs on the meta device under a tracker.

On the meta device, tensors have shapes but no data, so a model of any size runs in a fraction of a second. A stack of
equal blocks runs with four of them, and what one block keeps is counted for all omitted blocks: the peak is that of
the whole stack, exact to the byte if the blocks are equal.

``torch.distributed._tools.mem_tracker`` cannot replace this: it raises on frozen parameters, and would have to run
every block.

Not counted: fragmentation in the allocator, and workspaces inside kernels.
"""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig

from vargpt_rl.model.adapter import AdapterConfig, attach
from vargpt_rl.model.families import family_of
from vargpt_rl.model.scales import scale_index
from vargpt_rl.model.unified import Unified

META, CPU = torch.device("meta"), torch.device("cpu")
BLOCKS = 4
"""Blocks of a stack that run. The second stands for the omitted ones: the first may differ (it has no stochastic
depth), and what the second keeps is certain only once the fourth begins."""

aten = torch.ops.aten


@dataclass(frozen=True)
class MetaModel:
    """A model without data, with at most ``BLOCKS`` blocks per stack."""

    model: Unified
    stacks: tuple[tuple[nn.ModuleList, int], ...]
    """Each stack and its real number of blocks."""
    adapter: AdapterConfig | None = None
    """Settings of the model's adapter, if it has one."""
    results: dict[tuple, tuple] = field(default_factory=dict)
    """Cache of operators' results by their arguments."""


def meta_model(config: PreTrainedConfig, dtype: torch.dtype, adapter: AdapterConfig | None = None) -> MetaModel:
    """Build the model of ``config`` on the meta device, with an ``adapter`` as in SFT."""
    small = copy.deepcopy(config)
    kind = family_of(config).model
    depths = {}
    for blocks, (part, name) in kind.stacks.items():
        settings = getattr(small, part)
        depths[blocks] = getattr(settings, name)
        setattr(settings, name, min(depths[blocks], BLOCKS))
        if getattr(settings, "layer_types", None):
            settings.layer_types = settings.layer_types[:BLOCKS]
    with META:
        model = kind(small).to(dtype)
        if adapter is not None:
            attach(model, adapter, dropout=True)
    stacks = tuple((model.get_submodule(blocks), depth) for blocks, depth in depths.items())
    return MetaModel(model, stacks, adapter)


class _Held:
    """Bytes of a live storage, counted once per block it stands for."""

    def __init__(self, size: int):
        self.size = size


def _valued_tensor(data, device=None, _make=torch.tensor, **options) -> torch.Tensor:
    """Call ``torch.tensor``, keeping its values whatever the device."""
    return _make(data, **options)


def _gpu_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Call flash attention or, with a mask, memory-efficient attention, whose bias needs rows of a multiple of 8.

    By default the meta device would keep all scores.
    """
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    *rows, seen = attn_mask.shape
    bias = query.new_zeros(*rows, -(-seen // 8) * 8)[..., :seen].expand(*query.shape[:3], seen)
    return aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, dropout_p, scale=scale)[0]


class MemoryTracker(TorchDispatchMode):
    """Runs operators without data and adds up live storages: ``live`` bytes now, ``peak`` bytes at most.

    The model's own tensors do not count. Floats have no data; integers and masks are real, on the CPU, because control
    flow depends on them. Inference mode hides composite operators' parts: use ``torch.no_grad``, which needs the same
    memory.
    """

    def __init__(self, meta: MetaModel):
        super().__init__()
        self.meta = meta
        self.live = 0
        self.peak = 0
        self.held: weakref.WeakKeyDictionary[torch.UntypedStorage, _Held] = weakref.WeakKeyDictionary()
        self.recent: list[_Held] = []
        for tensor in (*meta.model.parameters(), *meta.model.buffers()):
            self.held[tensor.untyped_storage()] = _Held(0)

    def repeat(self, blocks: nn.ModuleList, more: int) -> list[RemovableHandle]:
        """Count what the second block keeps ``more`` more times, from the start of the fourth block on."""
        kept: list[_Held] = []

        def begin(*_):
            self.recent = []

        def end(*_):
            kept[:] = self.recent

        def multiply(*_):
            if torch._C._current_graph_task_id() != -1:
                return  # recomputation in the backward pass, one block at a time
            alive = set(self.held.values())
            for held in alive.intersection(kept):
                self.live += held.size * more
                held.size *= 1 + more

        return [
            blocks[1].register_forward_pre_hook(begin),
            blocks[1].register_forward_hook(end),
            blocks[3].register_forward_pre_hook(multiply),
        ]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = list(_tensors((args, tuple(kwargs.values()))))
        if any(tensor.is_meta for tensor in inputs):
            if func is aten._local_scalar_dense.default:
                return 0.0
            if func is aten._to_copy.default and kwargs.get("device") == CPU:
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype))
            if not all(tensor.is_meta for tensor in inputs):
                args, kwargs = tree_map_only(torch.Tensor, _without_data, (_with_positions(func, args), kwargs))
        elif kwargs.get("device") == META and not _made_dtype(inputs, kwargs).is_floating_point:
            kwargs = {**kwargs, "device": CPU}
        result = self._run(func, args, kwargs)
        for tensor in _tensors((result,)):
            self._hold(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _run(self, func, args: tuple, kwargs: dict):
        """Run an operator; if the same call made a new tensor before, make one like it instead."""
        call = func, _signature(args), _signature(kwargs.items())
        if call in self.meta.results:
            size, stride, dtype = self.meta.results[call]
            return torch.empty_strided(size, stride, dtype=dtype, device=META)
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and result.is_meta and result.untyped_storage() not in self.held:
            self.meta.results[call] = result.shape, result.stride(), result.dtype
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.held:
            held = self.held[storage] = _Held(storage.nbytes())
            self.recent.append(held)
            self.live += held.size
            weakref.finalize(storage, self._release, held)

    def _release(self, held: _Held) -> None:
        self.live -= held.size


@contextmanager
def counting(meta: MetaModel) -> Iterator[MemoryTracker]:
    """Track what runs inside. Finished gradients of parameters are dropped, as ZeRO does.

    The table of scales is cached by device: one made inside has values on the CPU, one made outside has none.
    """
    tracker = MemoryTracker(meta)
    trained = [parameter for parameter in meta.model.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(_drop_gradient) for parameter in trained]
    for blocks, depth in meta.stacks:
        if depth > BLOCKS:
            hooks += tracker.repeat(blocks, depth - BLOCKS)
    tensors = patch.object(torch, "tensor", _valued_tensor)
    attention = patch.object(F, "scaled_dot_product_attention", _gpu_attention)
    scale_index.cache_clear()
    try:
        with tensors, attention, tracker:
            yield tracker
    finally:
        scale_index.cache_clear()
        for hook in hooks:
            hook.remove()


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _tensors(values) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _signature(values) -> tuple:
    """Return all that the result of a call without data depends on."""
    parts: list[object] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            parts.append((value.shape, value.stride(), value.dtype, value.device))
        elif isinstance(value, (list, tuple)):
            parts.append(_signature(value))
        else:
            parts.append((type(value), value))
    return tuple(parts)


def _without_data(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_meta else torch.empty_like(tensor, device=META)


def _with_positions(func, args: tuple) -> tuple:
    """Turn index masks into positions while their number is still known."""
    if func not in (aten.index.Tensor, aten._index_put_impl_.default, aten.index_put_.default):
        return args
    positions = []
    for index in args[1]:
        positions += index.nonzero().unbind(1) if index is not None and index.dtype == torch.bool else [index]
    return args[0], positions, *args[2:]


def _made_dtype(inputs: list[torch.Tensor], kwargs: dict) -> torch.dtype:
    """Return the dtype of a new tensor: as requested, else its input's, else integers (``arange``)."""
    return kwargs.get("dtype") or (inputs[0].dtype if inputs else torch.int64)
