"""Floating-point operations of a training step, counted from shapes, and the share of the machine's peak they take.

A product of [m, k] and [k, n] takes 2 m k n operations. Counted are the linear layers and attention of the language
model, the projectors, the visual decoder and the text head: forward, and backward as far as something trains. A layer
whose weights are frozen needs half a backward pass, one that no trained parameter feeds none. Recomputed activations do
not count (model FLOPs; PaLM, arXiv 2204.02311, appendix B). Nor do norms, the vision tower and the image tokenizer, so
that the share is a lower bound.

Shape legend: B rows, T positions, N generated images, L image tokens, P prompt positions.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from vargpt_rl.model.scales import Schedule, token_count
from vargpt_rl.model.unified import Unified
from vargpt_rl.stages import feeds_language_model

PEAK_SIDE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices whose product gives the peak."""
PEAK_TRIES = 5


@dataclass(frozen=True)
class PassShape:
    """Sizes of a teacher-forced pass, padding included."""

    rows: int
    length: int
    """T."""
    images: int
    """N."""
    schedule: Schedule
    """Grids of the scales in the pass."""
    prompt: int
    """P: positions before the image, at most."""
    text_logits: bool = False

    @property
    def tokens(self) -> int:
        """L."""
        return token_count(self.schedule)


def shape_of(model: Unified, input_ids_BT: torch.Tensor, schedule: Schedule, text_logits: bool = False) -> PassShape:
    """Return the shape of a pass over these rows, whose images have this schedule (empty: they have no images)."""
    is_image_BT = input_ids_BT == model.config.image_gen_pad_token_id
    drawn_B = is_image_BT.any(1)
    prompt_B = is_image_BT.int().argmax(1) * drawn_B
    rows, length = input_ids_BT.shape
    images = int(is_image_BT.sum()) // max(1, token_count(schedule))
    return PassShape(rows, length, images, schedule, int(prompt_B.max()), text_logits)


def step_flops(model: Unified, shape: PassShape) -> int:
    """Count the operations of a forward and backward pass, for the parameters that train now."""
    config = model.config
    language, decoder = model.model.language_model, model.image_decoder
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    learns = feeds_language_model(trained)
    positions = shape.rows * shape.length
    tokens = shape.images * shape.tokens
    context = shape.images * shape.prompt

    def of_decoder(name: str) -> int:
        """Vectors that pass through a layer of the decoder."""
        if "modulation" in name or name.startswith("condition."):
            return shape.images
        return context if "cross_attention.kv" in name else tokens

    count = _linear(language, lambda name: positions, learns)
    if shape.text_logits:
        count += _linear(model.lm_head, lambda name: positions, learns)
    if model.has_language_model:
        count += _linear(model.projector_in, lambda name: tokens, learns)
    crosses = any(name.endswith("cross_attention.kv") for name, _ in decoder.named_modules())
    count += _linear(model.projector_out, lambda name: tokens + crosses * context, learns)
    count += _linear(decoder, of_decoder, True)
    causal = shape.rows * shape.length**2 // 2 * model.has_language_model
    text = config.text_config
    count += _attention(causal, text.hidden_size, text.num_hidden_layers, learns)
    seen = sum(h * w * token_count(shape.schedule[: k + 1]) for k, (h, w) in enumerate(shape.schedule))
    pairs = shape.images * (seen + crosses * shape.prompt * shape.tokens)
    return count + _attention(pairs, config.decoder_config.width, config.decoder_config.depth, True)


def drawing_flops(model: Unified, rows: int, prompt: int, schedule: Schedule, guided: bool) -> int:
    """Count the operations of sampling ``rows`` images with caches, up to their bits; the image tokenizer not.

    With guidance, v1.1's language model reads each scale once more, without what came before it.
    """
    language, decoder = model.model.language_model, model.image_decoder
    tokens = token_count(schedule)
    branches = 1 + guided
    drawn = rows * branches * tokens
    context = rows * branches * prompt

    def of_decoder(name: str) -> int:
        if "modulation" in name or name.startswith("condition."):
            return rows * branches
        return context if "cross_attention.kv" in name else drawn

    count = _forward(language, lambda name: rows * prompt + drawn)
    count += _forward(model.projector_in, lambda name: drawn)
    count += _forward(model.projector_out, lambda name: drawn + rows * prompt)
    count += _forward(decoder, of_decoder)
    text, visual = model.config.text_config, model.config.decoder_config
    alone = sum((h * w) ** 2 for h, w in schedule) if guided else 0
    pairs = rows * ((prompt + tokens) ** 2 + alone) // 2
    count += _attention(pairs, text.hidden_size, text.num_hidden_layers, False)
    seen = sum(h * w * token_count(schedule[: k + 1]) for k, (h, w) in enumerate(schedule))
    pairs = rows * branches * (seen + prompt * tokens)
    return count + _attention(pairs, visual.width, visual.depth, False)


def _linear(part: nn.Module, vectors: Callable[[str], int], learns: bool) -> int:
    """Count a part's linear layers, ``vectors(name)`` vectors each; ``learns``: gradients flow to its inputs."""
    count = 0
    for name, layer in part.named_modules():
        if isinstance(layer, nn.Linear):
            products = 1 + learns + layer.weight.requires_grad
            count += 2 * layer.in_features * layer.out_features * vectors(name) * products
    return count


def _forward(part: nn.Module, vectors: Callable[[str], int]) -> int:
    """Count a part's linear layers without a backward pass."""
    layers = [(name, layer) for name, layer in part.named_modules() if isinstance(layer, nn.Linear)]
    return sum(2 * layer.in_features * layer.out_features * vectors(name) for name, layer in layers)


def _attention(pairs: int, width: int, layers: int, learns: bool) -> int:
    """Count scores and weighted sums over ``pairs`` of queries and keys; the backward pass is twice as much."""
    return 4 * pairs * width * layers * (3 if learns else 1)


def matrix_peak(device: torch.device | str, dtype: torch.dtype) -> float:
    """Measure the best of several large matrix products: floating-point operations per second."""
    device = torch.device(device)
    side = PEAK_SIDE[device.type]
    generator = torch.Generator(device).manual_seed(0)  # leaves the global generator alone
    a, b = torch.randn(2, side, side, device=device, generator=generator).to(dtype)
    seconds = []
    for _ in range(PEAK_TRIES):
        _finish(device)
        began = time.perf_counter()
        a @ b
        _finish(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


def _finish(device: torch.device) -> None:
    """Wait until a GPU has run all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
