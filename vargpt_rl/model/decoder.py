"""Visual decoder: an Infinity-style transformer that turns language-model states into the bits of the next scale.

Block-causal over scales, 2-D rotary positions, cosine attention, adaptive layer norm shared by all blocks, and cross
attention to the prompt's states (specification, section 4, steps 1, 2, 8 and 9; Infinity, section 3.3). The condition
vector is attention-pooled from a single learned row, so the softmax of that pool is 1 and only its value path is
computed; its query and key weights are kept so that released checkpoints convert without loss.

Shape legend: N images, L image tokens, n tokens of one scale, T prompt positions, C width, h heads, e head width,
d bits and D logits a token.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vargpt_rl.model.configuration import DecoderConfig
from vargpt_rl.model.scales import Schedule, grid_positions, scale_index, scales_within

MAX_LOG_SCALE = 4.605170185988092  # ln 100: cosine attention is never sharper than this


class Condition(NamedTuple):
    """Conditioning of every layer of the decoder, one row per image."""

    start_N1C: torch.Tensor  # input of the first scale's only token
    modulation_N16C: torch.Tensor  # shared adaptive layer norm, before each block's own offset
    head_N2C: torch.Tensor  # scale and shift of the head's norm


@dataclass(frozen=True)
class DecoderContext:
    """The prompt's states for cross attention; ``mask_NT`` is False at padding."""

    states_NTC: torch.Tensor
    mask_NT: torch.Tensor

    @cached_property
    def attention_mask(self) -> torch.Tensor | None:
        """The mask over keys, bool [N, 1, 1, T]; None if there is no padding, because attention is faster without."""
        return None if self.mask_NT.all() else self.mask_NT[:, None, None]


class ScaleCache:
    """Keys and values of every block for the scales drawn so far; one per generated batch of images.

    Those of self attention are allocated once, for all ``tokens`` of the image; each scale is written into its place.
    """

    def __init__(self, depth: int, tokens: int):
        self.tokens = tokens
        self.self_kv: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * depth
        self.cross_kv: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * depth

    def write(
        self, block: int, k_Nhne: torch.Tensor, v_Nhne: torch.Tensor, at: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a block's keys and values of the tokens ``at``; return those of all tokens, [N, h, L, e] each."""
        known = self.self_kv[block]
        if known is None:
            shape = (*k_Nhne.shape[:2], self.tokens, k_Nhne.shape[3])
            known = self.self_kv[block] = k_Nhne.new_empty(shape), v_Nhne.new_empty(shape)
        keys_NhLe, values_NhLe = known
        keys_NhLe[:, :, at] = k_Nhne
        values_NhLe[:, :, at] = v_Nhne
        return known


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight, computed in fp32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class StartPool(nn.Module):
    """Attention pool over a single row, hence a projection of its value (the softmax over one key is 1)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, heads, width // heads) * 0.02)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, row_NC: torch.Tensor) -> torch.Tensor:
        return self.proj(self.kv(row_NC).chunk(2, -1)[1] + self.v_bias)


class ConditionEncoder(nn.Module):
    """Maps the learned start row, or the unconditional one, to the condition. Does not see the prompt."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        c = config.width
        self.start_embedding = nn.Parameter(torch.randn(c) * 0.02)
        self.unconditional = nn.Parameter(torch.randn(config.max_unconditional, c) * 0.02)
        self.norm = RMSNorm(c, config.norm_eps)
        self.pool = StartPool(c, config.heads)
        self.start_position = nn.Parameter(torch.randn(1, 1, c) * 0.02)
        self.modulation = nn.Linear(c, 6 * c)
        self.head_modulation = nn.Linear(c, 2 * c)

    def forward(self, unconditional_N: torch.Tensor) -> Condition:
        """Encode bool [N], True where the image's condition is dropped."""
        row_NC = torch.where(unconditional_N[:, None], self.unconditional[0], self.start_embedding)
        cond_NC = self.pool(self.norm(row_NC))
        active_NC = F.silu(cond_NC)
        return Condition(
            cond_NC[:, None] + self.start_position,
            self.modulation(active_NC).unflatten(1, (1, 6, -1)),
            self.head_modulation(active_NC).unflatten(1, (2, -1)),
        )


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # a table cached while sampling must also work in training
def _rope_table(schedule: Schedule, head_width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos, sin fp32 [L, e/2]: the first half of the pairs encodes the row, the second half the column."""
    quarter = head_width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
    position_L2 = grid_positions(schedule).float()
    angle = torch.cat([position_L2[:, :1] * frequency, position_L2[:, 1:] * frequency], dim=1)
    return angle.cos().to(device), angle.sin().to(device)


def _rotate(x_NhLe: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the interleaved pairs (2i, 2i+1) in fp32."""
    even, odd = x_NhLe.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x_NhLe.dtype)


def attend_by_scale(
    q_Nhne: torch.Tensor, k_NhLe: torch.Tensor, v_NhLe: torch.Tensor, scales: list[slice]
) -> torch.Tensor:
    """Block-causal attention, [N, n, h * e]: each scale's queries see the keys up to the end of their scale.

    ``q_Nhne`` holds the tokens of ``scales``; the others hold all tokens from the first on. One call per scale computes
    no hidden scores and needs no mask, so it runs in a flash kernel on GPUs.
    """
    outputs = []
    for at, query in zip(scales, q_Nhne.split([at.stop - at.start for at in scales], dim=2), strict=True):
        seen = F.scaled_dot_product_attention(query, k_NhLe[:, :, : at.stop], v_NhLe[:, :, : at.stop], scale=1.0)
        outputs.append(seen.transpose(1, 2).flatten(2))
    return torch.cat(outputs, dim=1)


class SelfAttention(nn.Module):
    """Cosine attention: unit-length queries and keys, a learned temperature per head, no key bias; rotary optional."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.full((1, heads, 1, 1), 4.0).log())
        self.proj = nn.Linear(width, width)

    def forward(self, x_NLC, rope, scales: list[slice], cache: ScaleCache | None, block: int) -> torch.Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = (self.qkv(x_NLC) + bias).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q = F.normalize(q.float(), dim=-1, eps=1e-12) * self.log_scale.float().clamp(max=MAX_LOG_SCALE).exp()
        k = F.normalize(k.float(), dim=-1, eps=1e-12)
        if rope is not None:
            q, k = _rotate(q, *rope), _rotate(k, *rope)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if cache is not None:
            k, v = cache.write(block, k, v, slice(scales[0].start, scales[-1].stop))
        return self.proj(attend_by_scale(q, k, v, scales))


class CrossAttention(nn.Module):
    """Scaled dot-product attention from image tokens to the prompt's states."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x_NLC, context: DecoderContext, cache: ScaleCache | None, block: int) -> torch.Tensor:
        q = self.q(x_NLC).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        known = cache.cross_kv[block] if cache is not None else None
        if known is not None:
            k, v = known
        else:
            bias = torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
            kv = (self.kv(context.states_NTC) + bias).unflatten(-1, (2, self.heads, -1))
            k, v = kv.permute(2, 0, 3, 1, 4)
            if cache is not None:
                cache.cross_kv[block] = (k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=context.attention_mask)
        return self.proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with a tanh GELU between them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Return the stochastic depth of each block, growing linearly from 0 to ``last``."""
    return [last * i / max(depth - 1, 1) for i in range(depth)]


def modulated_norm(x_NLC: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    """Layer norm without weights, then an adaptive scale and shift, [N, 1, C] each."""
    return F.layer_norm(x_NLC, x_NLC.shape[-1:], eps=eps) * (1 + scale) + shift


def drop_branch(branch_NLC: torch.Tensor, rate: float) -> torch.Tensor:
    """Stochastic depth: drop an image's whole branch with probability ``rate``, rescale the others."""
    if rate == 0.0:
        return branch_NLC
    keep_N11 = torch.rand(len(branch_NLC), 1, 1, device=branch_NLC.device) >= rate
    return branch_NLC * keep_N11.to(branch_NLC.dtype) / (1 - rate)


class DecoderBlock(GradientCheckpointingLayer):
    """Self attention, cross attention, feed-forward; all but cross attention are modulated and gated."""

    def __init__(self, config: DecoderConfig, index: int):
        super().__init__()
        c = config.width
        self.index = index
        self.eps = config.norm_eps
        self.modulation_offset = nn.Parameter(torch.tensor([0.5, 0.5, 0, 0, 0, 0])[:, None].repeat(1, 1, 1, c))
        self.self_attention = SelfAttention(c, config.heads)
        self.cross_norm = nn.LayerNorm(c, eps=config.norm_eps)
        self.cross_attention = CrossAttention(c, config.heads)
        self.feed_forward = FeedForward(c, config.mlp_ratio * c)

    def forward(self, x_NLC, modulation_N16C, context, rope, scales, drop_path, cache=None) -> torch.Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = (self.modulation_offset + modulation_N16C).unbind(2)
        norm = modulated_norm(x_NLC, scale1, shift1, self.eps)
        branch = self.self_attention(norm, rope, scales, cache, self.index)
        x_NLC = x_NLC + drop_branch(gate1 * branch, drop_path)
        x_NLC = x_NLC + self.cross_attention(self.cross_norm(x_NLC), context, cache, self.index)
        branch = self.feed_forward(modulated_norm(x_NLC, scale2, shift2, self.eps))
        return x_NLC + drop_branch(gate2 * branch, drop_path)


class VisualDecoder(nn.Module):
    """Maps states of the image tokens to two logits for each bit of the same token (no shift by one)."""

    def __init__(self, config: DecoderConfig, bits: int):
        super().__init__()
        c = config.width
        self.config = config
        self.condition = ConditionEncoder(config)
        self.word_embedding = nn.Linear(bits, c)
        self.level_embedding = nn.Embedding(config.max_scales, c)
        self.blocks = nn.ModuleList(DecoderBlock(config, i) for i in range(config.depth))
        self.head = nn.Linear(c, 2 * bits)

    def words(self, inputs_NnD: torch.Tensor, tokens: slice) -> torch.Tensor:
        """Embed ``tokens`` of the schedule for the language model: [N, n, C]. The first token has no input."""
        return self.word_embedding(inputs_NnD)

    def forward(
        self,
        y_NLC: torch.Tensor,
        condition: Condition,
        context: DecoderContext,
        schedule: Schedule,
        drop_path: float = 0.0,
        cache: ScaleCache | None = None,
        tokens: slice = slice(None),
    ) -> torch.Tensor:
        """Return logits [N, L, 2d]; channel 2b says "bit b is 0", channel 2b + 1 says "bit b is 1".

        ``y_NLC`` holds the ``tokens`` of the schedule. Teacher forced, these are the tokens of all scales, or of the
        first ones, and no scale attends to finer ones. With a ``cache``, they are the tokens of one scale and
        attend to the cached ones too.
        """
        scale_L = scale_index(schedule, y_NLC.device)[tokens]
        rope = _rope_table(schedule, self.config.width // self.config.heads, y_NLC.device)
        cos, sin = (table_Le[tokens] for table_Le in rope)
        scales = scales_within(schedule, tokens)
        x = y_NLC + self.level_embedding(scale_L)
        for block, rate in zip(self.blocks, drop_path_rates(drop_path, len(self.blocks)), strict=True):
            x = block(x, condition.modulation_N16C, context, (cos, sin), scales, rate, cache)
        scale_N1C, shift_N1C = condition.head_N2C.split(1, dim=1)
        return self.head(modulated_norm(x, scale_N1C, shift_N1C, self.config.norm_eps))
