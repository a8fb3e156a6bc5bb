"""CUDA graphs of sampling: what they read, their noise, and, on a GPU, that they draw what is drawn without them."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import import_utils

from vargpt_rl.model import graphs
from vargpt_rl.model.generate import GenerationState, SamplingConfig, draw_scales, generate_images, start_drawing
from vargpt_rl.model.graphs import DrawingGraphs, ListedNoise, StoredNoise, inputs_of
from vargpt_rl.model.noise import SeededNoise

SIZE = (64, 64)
TEXTS = [("a star", "two small blue squares above a large green triangle"), ("a large red circle", "a tiny star")]


def prompts(chat, texts):
    rows = [chat.drawing_prompt(text, "") for text in texts]
    ids_BT = chat.pad(rows, "left", multiple=64)
    return ids_BT, chat.pad([[1] * len(row) for row in rows], "left", value=0, multiple=64)


def read(model, chat, texts, sampling):
    reading = GenerationState(model, len(texts))
    reading.read(*prompts(chat, texts))
    return reading, start_drawing(reading, sampling)


def sampling_of(model, guided):
    off = 1.0 if model.guided(0.0) else 0.0
    return SamplingConfig(cfg=3.0 if guided else off, tau=1.0)


@pytest.mark.parametrize("family", ["", "v1_"])
@pytest.mark.parametrize("guided", [False, True])
@torch.inference_mode()
def test_a_batch_written_over_another_is_drawn_as_by_itself(family, guided, request):
    """All that drawing reads is among the inputs: what was missing would keep the first batch's values."""
    model, chat = (request.getfixturevalue(family + name) for name in ("model", "chat"))
    sampling = sampling_of(model, guided)
    reading, start = read(model, chat, TEXTS[0], sampling)
    draws = []
    draw_scales(*read(model, chat, TEXTS[0], sampling), ListedNoise(SeededNoise([1, 2]), draws), SIZE, sampling)
    noise = StoredNoise(draws, SeededNoise([1, 2]))
    inputs = inputs_of(reading, start)
    other, other_start = read(model, chat, TEXTS[1], sampling)
    torch._foreach_copy_(inputs, inputs_of(other, other_start))
    noise.renew(SeededNoise([7, 8]))
    expected = draw_scales(other, other_start, SeededNoise([7, 8]), SIZE, sampling)
    found = draw_scales(reading, start, noise, SIZE, sampling)
    first = draw_scales(*read(model, chat, TEXTS[0], sampling), SeededNoise([1, 2]), SIZE, sampling)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    assert not torch.equal(first.labels_BLs, expected.labels_BLs)


class _Transfers(TorchDispatchMode):
    """Lists operators that move data between devices; those that read a value fail on the meta device anyway."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [tensor for tensor in (*args, result) if isinstance(tensor, torch.Tensor) and tensor.ndim]
        if len({tensor.device for tensor in tensors}) > 1:
            self.found.append(func)
        return result


class _NoNoise(SeededNoise):
    def draw(self, source, shape, dtype):
        return torch.zeros(2, *shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("family", ["", "v1_"])
@pytest.mark.parametrize("guided", [False, True])
@torch.inference_mode()
def test_drawing_never_waits_for_the_device(family, guided, request, monkeypatch):
    model, chat = (request.getfixturevalue(family + name) for name in ("model", "chat"))
    monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)  # transformers skips its own checks
    sampling = sampling_of(model, guided)
    reading, start = read(model, chat, TEXTS[0], sampling)
    inputs_of(reading, start)  # the context's mask is decided
    meta_model = copy.deepcopy(model).to("meta")
    meta = GenerationState(meta_model, 2)
    for index, layer in enumerate(reading.cache.layers):
        meta.cache.update(layer.keys.to("meta"), layer.values.to("meta"), index)
    meta.mask_BT, meta.next_position_B = reading.mask_BT.to("meta"), reading.next_position_B.to("meta")
    condition = type(start.condition)(*(tensor.to("meta") for tensor in start.condition))
    context = copy.copy(start.context)
    if context is not None:
        mask = context.attention_mask
        context = type(context)(context.states_NTC.to("meta"), context.mask_NT.to("meta"))
        context.__dict__["attention_mask"] = None if mask is None else mask.to("meta")
    moved = start._replace(condition=condition, context=context)
    noise = _NoNoise([0, 1])
    for _ in range(2):  # tables of positions are made, and moved, once
        with _Transfers() as transfers:
            draw_scales(copy.deepcopy(meta), moved, noise, SIZE, sampling)
    assert transfers.found == []


def test_least_recent_shapes_are_dropped(model, chat, monkeypatch):
    monkeypatch.setattr(graphs, "GRAPHS", 2)
    draw = DrawingGraphs()
    for texts in (["a star"], ["a star", "a circle"], ["a star"] * 3):
        generate_images(model, *prompts(chat, texts), [0] * len(texts), SIZE, SamplingConfig(), draw=draw)
    assert [shape[-1][0][0] for shape in draw.shapes] == [2, 3]


def test_given_scales_are_completed_without_a_graph(model, chat):
    draw = DrawingGraphs()
    ids_BT, mask_BT = prompts(chat, ["a star"])
    drawn = generate_images(model, ids_BT, mask_BT, [0], SIZE, SamplingConfig())
    given = {"given_BLs": drawn.labels_BLs[:, :5]}
    expected = generate_images(model, ids_BT, mask_BT, [1], SIZE, SamplingConfig(), **given)
    found = generate_images(model, ids_BT, mask_BT, [1], SIZE, SamplingConfig(), **given, draw=draw)
    assert torch.equal(found.labels_BLs, expected.labels_BLs) and not draw.shapes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["", "v1_"])
@torch.inference_mode()
def test_a_graph_draws_what_is_drawn_without_it(family, request):
    model, chat = (request.getfixturevalue(family + name) for name in ("model", "chat"))
    fast = copy.deepcopy(model).to("cuda")
    sampling = sampling_of(model, guided=True)
    draw = DrawingGraphs()
    for seed in range(4):  # as usual, recorded, replayed, replayed with other weights
        if seed == 3:
            for parameter in fast.image_decoder.parameters():
                parameter.mul_(1.1)
        batch = [tensor.cuda() for tensor in prompts(chat, TEXTS[seed % 2])]
        seeds = [seed, seed + 10]
        expected = generate_images(fast, *batch, seeds, SIZE, sampling)
        found = generate_images(fast, *batch, seeds, SIZE, sampling, draw=draw)
        # Other kernels of attention: a bit in a thousand may be drawn otherwise, and what follows from it.
        assert (found.labels_BLs == expected.labels_BLs).float().mean() > 0.98
    assert len(draw.shapes) == 1
