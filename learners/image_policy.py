"""The model as preference and policy-gradient trainers see it: tokens in, log-probabilities of image tokens out.

Shape legend: B rows, T positions, L image tokens, s symbols a token (32 bits, or one index), K scales of the pass.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vargpt_rl.losses.credit import summed_tokens
from vargpt_rl.model.likelihood import (
    log_prob_tolerance,
    scale_means,
    scale_sums,
    symbol_entropy,
    symbol_hits,
    symbol_log_probs,
)
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.scales import Schedule
from vargpt_rl.model.unified import Unified, VargptOutput, replayed
from vargpt_rl.model.v1.modeling import VargptV1

if TYPE_CHECKING:
    from vargpt_rl.model.unified import Unified as MixedInto
else:
    MixedInto = object


def sum_tolerance(model: Unified, schedule: Schedule, credit_K: torch.Tensor) -> float:
    """Nats by which an image's log-probability, weighted by scale, may differ under equal weights."""
    bits = model.config.image_tokenizer_config.symbols.bits
    return log_prob_tolerance(model.dtype, summed_tokens(schedule, credit_K) * bits)


@dataclass
class ScoredOutput(VargptOutput):
    """Scores at positions 1..T-1, as TRL's loss reads them (zero away from image tokens), and by scale.

    ``log_probs`` float64 [B, T-1]; ``entropy`` in nats a symbol, ``mean_logits``, ``is_top1`` (every symbol right)
    likewise; ``log_probs_BK`` float64, unweighted, and ``accuracy_BK`` fp32 by scale. Only log-probabilities have
    gradients.
    """

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    log_probs_BK: torch.Tensor | None = None
    accuracy_BK: torch.Tensor | None = None


class _ScoresImages(MixedInto):
    """Mixin that makes a model return the log-probabilities of given image tokens."""

    def forward(  # type: ignore[override]  # trainers call a policy with image tokens, never as a plain model
        self,
        input_ids,
        attention_mask,
        bits,
        resolution,
        credit_L: torch.Tensor | None = None,
        scales: int | None = None,
        tau: float = 1.0,
        states: torch.Tensor | None = None,
        **ignored,
    ) -> ScoredOutput:
        """Score integers [B, L, s], ``bits``, of square images of ``resolution`` pixels.

        ``credit_L`` weighs the log-probabilities of tokens in ``log_probs``, but not those by scale. ``scales`` limits
        the pass to that many coarse scales, whose tokens ``bits`` then holds. Logits are divided by ``tau``. With
        ``states`` [B, T, H] of an earlier pass, the language model is not run.
        """
        side = int(resolution)
        schedule = self.image_tokenizer.schedule_for(side)[:scales]
        symbols = self.config.image_tokenizer_config.symbols
        drawing = replayed(bits, (side, side), scales)
        output = super().forward(input_ids, attention_mask, drawing=drawing, text_logits=False, states=states)
        assert output.image_logits is not None  # a pass with a drawing returns them
        logits = output.image_logits / tau
        log_probs_BLs = symbol_log_probs(logits, bits)
        hits_BLs = symbol_hits(logits, bits)
        log_probs_BL = log_probs_BLs.sum(-1, dtype=torch.float64)
        if credit_L is not None:
            log_probs_BL = log_probs_BL * credit_L
        at_BT = input_ids == self.config.image_gen_pad_token_id

        def spread(values_BL: torch.Tensor) -> torch.Tensor:
            """[B, L] -> [B, T-1]: to the image tokens' positions, dropping the first as TRL's shift does."""
            row = values_BL.new_zeros(at_BT.shape)
            return row.masked_scatter(at_BT, values_BL)[:, 1:]

        return ScoredOutput(
            log_probs=spread(log_probs_BL),
            entropy=spread(symbol_entropy(logits.detach(), symbols).mean(-1)),
            mean_logits=spread(logits.detach().float().mean(-1)),
            is_top1=spread(hits_BLs.all(-1)),
            log_probs_BK=scale_sums(log_probs_BLs, schedule),
            accuracy_BK=scale_means(hits_BLs.float(), schedule),
            states=output.states,
        )


class ImagePolicy(_ScoresImages, Vargpt):
    """v1.1 as a policy over image tokens."""


class V1ImagePolicy(_ScoresImages, VargptV1):
    """v1 as a policy over image tokens."""


POLICIES: dict[type[Unified], type[Unified]] = {Vargpt: ImagePolicy, VargptV1: V1ImagePolicy}
