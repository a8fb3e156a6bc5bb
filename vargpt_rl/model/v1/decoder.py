"""The visual decoder of v1: VAR's transformer, which turns language-model states into codebook logits.

Block-causal over scales, cosine attention without rotation, adaptive layer norm with weights of each block's own
(VARGPT, section 7.1; specification, section 4, steps 1, 2, 6 and 7). Learned absolute positions are added before the
language model and nowhere else; the prompt reaches the image through the language model alone. Of the published table
of classes only two rows are ever used, and only these are here: "draw" and "condition dropped".

Shape legend: N images, L image tokens, n tokens of one scale, C width, d latent channels, V codes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vargpt_rl.model.decoder import FeedForward, ScaleCache, SelfAttention, drop_branch
from vargpt_rl.model.scales import STRIDE, Schedule, scale_index, token_count
from vargpt_rl.model.v1.configuration import V1DecoderConfig, V1ImageTokenizerConfig


class V1Condition(NamedTuple):
    """What every layer of the decoder is conditioned on, a row an image."""

    start_N1C: torch.Tensor  # input of the first scale's only token
    active_NC: torch.Tensor  # what each block's modulation is a linear map of


class Places(nn.Module):
    """Learned vectors of each token's scale and place, and one more for the first token."""

    def __init__(self, width: int, schedule: Schedule):
        super().__init__()
        self.schedule = schedule
        self.start = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, token_count(schedule), width) * 0.02)
        self.level = nn.Embedding(len(schedule), width)

    def forward(self, tokens: slice) -> torch.Tensor:
        """[1, n, C]"""
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

    def forward(self, x_NLC, active_NC, mask_LL, drop_path, cache: ScaleCache | None = None) -> torch.Tensor:
        modulation_N16C = self.modulation(active_NC).unflatten(1, (1, 6, -1))
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation_N16C.unbind(2)
        norm = F.layer_norm(x_NLC, x_NLC.shape[-1:], eps=self.eps)
        branch = self.self_attention(norm * (1 + scale1) + shift1, None, mask_LL, cache, self.index)
        x_NLC = x_NLC + drop_branch(gate1 * branch, drop_path)
        norm = F.layer_norm(x_NLC, x_NLC.shape[-1:], eps=self.eps)
        branch = self.feed_forward(norm * (1 + scale2) + shift2)
        return x_NLC + drop_branch(gate2 * branch, drop_path)


class V1VisualDecoder(nn.Module):
    """States of the image tokens -> a logit for each code of the same token: there is no shift."""

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
        """bool [N], True where the image's condition is dropped. Does not see the prompt."""
        class_NC = self.class_embedding(unconditional_N.long())
        return V1Condition(class_NC[:, None] + self.places(slice(0, 1)), F.silu(class_NC))

    def words(self, inputs_Nnd: torch.Tensor, tokens: slice) -> torch.Tensor:
        """[N, n, C]: what the language model is given for ``tokens`` of the schedule, the first one aside."""
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
        """Logits float [N, L, V].

        ``y_NLC`` holds the ``tokens`` of the schedule. Teacher forced, these are the tokens of all scales, or of the
        first ones, and a block-causal mask hides finer scales. With a ``cache``, they are the tokens of one scale and
        see what the cache holds. ``context`` there is none.
        """
        mask_LL = None
        if cache is None:
            scale_L = scale_index(schedule, y_NLC.device)[tokens]
            mask_LL = scale_L[:, None] >= scale_L[None, :]
        x = y_NLC
        for i, block in enumerate(self.blocks):
            # The rate grows with depth, from 0 to one that is the full one in a decoder of 24 blocks (VAR).
            rate = drop_path * len(self.blocks) / 24 * i / max(len(self.blocks) - 1, 1)
            x = block(x, condition.active_NC, mask_LL, rate, cache)
        scale_NC, shift_NC = self.head_modulation(condition.active_NC).chunk(2, -1)
        x = F.layer_norm(x, x.shape[-1:], eps=self.config.norm_eps)
        return self.head(x * (1 + scale_NC[:, None]) + shift_NC[:, None])
