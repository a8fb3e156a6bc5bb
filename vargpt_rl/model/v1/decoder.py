"""Visual decoder of v1: VAR's transformer, which turns language-model states into codebook logits.

Block-causal over scales, cosine attention without rotary positions, adaptive layer norm with separate weights in each
block (VARGPT, section 7.1; specification, section 4, steps 1, 2, 6 and 7). Learned absolute positions are added before
the language model and nowhere else; the prompt reaches the image only through the language model. The published class
table has many rows but uses two, "draw" and "condition dropped"; this model has only those.

Shape legend: N images, L image tokens, n tokens of one scale, C width, d latent channels, V codes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vargpt_rl.model.decoder import (
    FeedForward,
    ScaleCache,
    SelfAttention,
    drop_branch,
    drop_path_rates,
    modulated_norm,
)
from vargpt_rl.model.scales import STRIDE, Schedule, scale_index, scales_within, token_count
from vargpt_rl.model.v1.configuration import V1DecoderConfig, V1ImageTokenizerConfig


class V1Condition(NamedTuple):
    """Conditioning of every layer of the decoder, one row per image."""

    start_N1C: torch.Tensor  # input of the first scale's only token
    active_NC: torch.Tensor  # input of each block's modulation


class Places(nn.Module):
    """Learned embeddings of each token's scale and position, and one more for the first token."""

    def __init__(self, width: int, schedule: Schedule):
        super().__init__()
        self.schedule = schedule
        self.start = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, token_count(schedule), width) * 0.02)
        self.level = nn.Embedding(len(schedule), width)

    def forward(self, tokens: slice) -> torch.Tensor:
        """Return the embeddings of ``tokens`` of the schedule: [1, n, C]."""
        level_nC = self.level(scale_index(self.schedule, self.position.device)[tokens])
        places_1nC = level_nC + self.position[:, tokens]
        return places_1nC + self.start if tokens.start == 0 else places_1nC


class V1DecoderBlock(GradientCheckpointingLayer):
    """Self attention and feed-forward, both modulated and gated."""

    def __init__(self, config: V1DecoderConfig, index: int):
        super().__init__()
        c = config.width
        self.index = index
        self.eps = config.norm_eps
        self.modulation = nn.Linear(c, 6 * c)
        self.self_attention = SelfAttention(c, config.heads)
        self.feed_forward = FeedForward(c, config.mlp_ratio * c)

    def forward(self, x_NLC, active_NC, scales, drop_path, cache: ScaleCache | None = None) -> torch.Tensor:
        modulation_N16C = self.modulation(active_NC).unflatten(1, (1, 6, -1))
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation_N16C.unbind(2)
        norm = modulated_norm(x_NLC, scale1, shift1, self.eps)
        branch = self.self_attention(norm, None, scales, cache, self.index)
        x_NLC = x_NLC + drop_branch(gate1 * branch, drop_path)
        branch = self.feed_forward(modulated_norm(x_NLC, scale2, shift2, self.eps))
        return x_NLC + drop_branch(gate2 * branch, drop_path)


class V1VisualDecoder(nn.Module):
    """Maps states of the image tokens to a logit for each code of the same token (no shift by one)."""

    def __init__(self, config: V1DecoderConfig, tokenizer: V1ImageTokenizerConfig):
        super().__init__()
        c = config.width
        self.config = config
        self.class_embedding = nn.Embedding(2, c)
        self.word_embedding = nn.Linear(tokenizer.latent_channels, c)
        self.places = Places(c, tokenizer.schedule_for(STRIDE * tokenizer.sides[-1]))
        self.blocks = nn.ModuleList(V1DecoderBlock(config, i) for i in range(config.depth))
        self.head_modulation = nn.Linear(c, 2 * c)
        self.head = nn.Linear(c, tokenizer.codes)

    def condition(self, unconditional_N: torch.Tensor) -> V1Condition:
        """Encode bool [N], True where the image's condition is dropped. Does not see the prompt."""
        class_NC = self.class_embedding(unconditional_N.long())
        return V1Condition(class_NC[:, None] + self.places(slice(0, 1)), F.silu(class_NC))

    def words(self, inputs_Nnd: torch.Tensor, tokens: slice) -> torch.Tensor:
        """Embed ``tokens`` of the schedule for the language model: [N, n, C]. The first token has no input."""
        return self.word_embedding(inputs_Nnd) + self.places(tokens)

    def forward(
        self,
        y_NLC: torch.Tensor,
        condition: V1Condition,
        context: None,
        schedule: Schedule,
        drop_path: float = 0.0,
        cache: ScaleCache | None = None,
        tokens: slice = slice(None),
    ) -> torch.Tensor:
        """Return logits [N, L, V].

        ``y_NLC`` holds the ``tokens`` of the schedule. Teacher forced, these are the tokens of all scales, or of the
        first ones, and no scale attends to finer ones. With a ``cache``, they are the tokens of one scale and
        attend to the cached ones too. ``context`` is not used.
        """
        scales = scales_within(schedule, tokens)
        depth = len(self.blocks)
        rates = drop_path_rates(drop_path * depth / 24, depth)  # VAR: ``drop_path`` is that of a 24-block decoder
        x = y_NLC
        for block, rate in zip(self.blocks, rates, strict=True):
            x = block(x, condition.active_NC, scales, rate, cache)
        scale_N1C, shift_N1C = self.head_modulation(condition.active_NC)[:, None].chunk(2, -1)
        return self.head(modulated_norm(x, scale_N1C, shift_N1C, self.config.norm_eps))
