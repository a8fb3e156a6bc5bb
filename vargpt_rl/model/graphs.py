"""Image generation as CUDA graphs: all scales of a batch are one launch, instead of some thousand for each scale.

Small batches are bound by these launches. A graph fits one shape: batch, prompt length, image size and sampling. The
first batch of a shape is drawn as usual, the second is recorded while it is drawn, further ones are replayed. A graph
reads the weights where they are, so it stays true after they are swapped in place.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch

from vargpt_rl.model.generate import DrawingStart, GeneratedImages, GenerationState, SamplingConfig, draw_scales
from vargpt_rl.model.noise import SeededNoise, Source

GRAPHS = 16
"""Shapes that are kept; of more, the least recently drawn is dropped."""
PROMPT_MULTIPLE = 32
"""On GPUs prompts are padded to a multiple of this, so that few shapes occur: graphs are made for a shape, and so are
cuDNN's attention kernels, at half a second for each new prompt length."""

Draw = tuple[Source, tuple[int, ...], torch.dtype]
"""One draw of noise: source, shape for each image, dtype."""


class ListedNoise(SeededNoise):
    """Noise that lists its draws."""

    def __init__(self, noise: SeededNoise, draws: list[Draw]):
        self.noise = noise
        self.draws = draws

    def draw(self, source: Source, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        self.draws.append((source, shape, dtype))
        return self.noise.draw(source, shape, dtype)


class StoredNoise(SeededNoise):
    """Noise that was drawn before, in the order of ``draws``, and is written into the same tensors for each batch."""

    def __init__(self, draws: list[Draw], noise: SeededNoise):
        self.draws = draws
        self.drawn = [noise.draw(*draw) for draw in draws]
        self.next = iter(self.drawn)

    def renew(self, noise: SeededNoise) -> None:
        """Draw the numbers of another batch."""
        for stored, draw in zip(self.drawn, self.draws, strict=True):
            stored.copy_(noise.draw(*draw))

    def draw(self, source: Source, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return next(self.next)


def inputs_of(reading: GenerationState, start: DrawingStart) -> list[torch.Tensor]:
    """Return all tensors that drawing reads, besides weights and noise."""
    layers: Any = reading.cache.layers
    found = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    found += [reading.mask_BT, reading.next_position_B, *start.condition]
    if start.context is not None:
        found += [start.context.states_NTC, start.context.mask_NT]
        if start.context.attention_mask is not None:
            found.append(start.context.attention_mask)
    return found


class DrawingGraph:
    """`draw_scales` for batches of one shape, recorded with the first of them."""

    def __init__(
        self,
        reading: GenerationState,
        start: DrawingStart,
        noise: StoredNoise,
        size: tuple[int, int],
        sampling: SamplingConfig,
        pool: Any,
    ):
        self.noise = noise
        self.inputs = inputs_of(reading, start)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.output = draw_scales(reading, start, noise, size, sampling)

    def draw(self) -> GeneratedImages:
        """Replay the graph; returns copies of its output, which the next replay overwrites."""
        self.graph.replay()
        return GeneratedImages(*(tensor.clone() for tensor in self.output))

    def renew(self, inputs: list[torch.Tensor], noise: SeededNoise) -> None:
        """Write the `inputs_of` another batch and its noise where the graph reads them."""
        torch._foreach_copy_(self.inputs, inputs)
        self.noise.renew(noise)


@dataclass
class DrawingGraphs:
    """Draws as `vargpt_rl.model.generate.draw_scales` does, for any shapes; weights must be changed in place."""

    shapes: OrderedDict[tuple, DrawingGraph | list[Draw]] = field(default_factory=OrderedDict)
    """The graph of each shape, or the draws of noise of one that was drawn once."""
    pool: Any = None
    """Memory that the graphs share: they run in turns, and what they return is copied."""

    def __call__(
        self,
        reading: GenerationState,
        start: DrawingStart,
        noise: SeededNoise,
        size: tuple[int, int],
        sampling: SamplingConfig,
        given_BLs: torch.Tensor | None = None,
    ) -> GeneratedImages:
        """Draw a batch; a completion of given scales is drawn as usual. The reading is used up."""
        if given_BLs is not None:
            return draw_scales(reading, start, noise, size, sampling, given_BLs)
        inputs = inputs_of(reading, start)
        shape = (size, *vars(sampling).values(), tuple(tensor.shape for tensor in inputs))
        known = self.shapes.pop(shape, None)
        match known:
            case None:
                draws: list[Draw] = []
                drawn = draw_scales(reading, start, ListedNoise(noise, draws), size, sampling)
                self.shapes[shape] = draws
            case DrawingGraph():
                known.renew(inputs, noise)
                self.shapes[shape] = known
                drawn = known.draw()
            case _:
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                graph = DrawingGraph(reading, start, StoredNoise(known, noise), size, sampling, self.pool)
                self.shapes[shape] = graph
                drawn = graph.draw()
        while len(self.shapes) > GRAPHS:
            self.shapes.popitem(last=False)
        return drawn
