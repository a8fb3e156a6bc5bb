"""Direct preference optimisation on image tokens alone: a ``trl.DPOTrainer`` whose loss is TRL's own.

The log-likelihood of an image is the sum over its bits (VARGPT-v1.1, eq. 4), in v1 over its indices, at the positions
of its image tokens; the completion mask is the image-token mask. References were scored by the rollout workers and come
with the pairs. No image is encoded or decoded here, and neither the text head nor a reference model is run.

Deviations from the published code (specification, section 9): policy and reference score the same bits, with no bit
flips, no condition drop and no drop path, so that at step 0 every log-ratio is zero. That is asserted, in training.

Shape legend: P pairs, B = 2P rows ordered [chosen, rejected], T positions, L image tokens, s symbols a token (32 bits,
or one index), K scales.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from trl import DPOTrainer

from learners.pairs import PairOrder, PairTable
from learners.resume import Resumable
from vargpt_rl.model.likelihood import scale_means, scale_sums, symbol_entropy, symbol_hits, symbol_log_probs
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.unified import VargptOutput, replayed
from vargpt_rl.model.v1.modeling import VargptV1

STEP0_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.5, torch.float16: 0.1}
"""Largest |log-ratio| in nats accepted at step 0: sums over all bits, whose rounding may differ by kernel choice where
worker and learner are not the same machine."""


def log_prob_scale(norm: str, tokens: int, bits: int) -> float:
    """What a summed log-probability is multiplied by under ``logp_norm``."""
    return {"sum": 1.0, "per_token": 1 / tokens, "per_bit": 1 / (tokens * bits)}[norm]


@dataclass
class ScoredOutput(VargptOutput):
    """What TRL's loss reads, at positions 1..T-1 (zero away from image tokens), and the same by scale.

    ``log_probs`` float64 [B, T-1], ``entropy``, ``mean_logits``, ``is_top1`` (every symbol right) likewise;
    ``log_probs_BK`` float64 and ``accuracy_BK`` fp32 by scale.
    """

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    log_probs_BK: torch.Tensor | None = None
    accuracy_BK: torch.Tensor | None = None


class _ScoresPairs:
    """The model as DPO sees it: given a pair batch, it returns log-probabilities of image tokens."""

    def forward(self, input_ids, attention_mask, bits, resolution, **ignored) -> ScoredOutput:
        """``bits`` integers [B, L, s], square images of ``resolution`` pixels; see ``PairCollator``."""
        side = int(resolution)
        schedule, symbols = self.image_tokenizer.schedule_for(side), self.config.image_tokenizer_config.symbols
        drawing = replayed(bits, (side, side))
        logits = super().forward(input_ids, attention_mask, drawing=drawing, text_logits=False).image_logits
        log_probs_BLs = symbol_log_probs(logits, bits)
        hits_BLs = symbol_hits(logits, bits)
        at_BT = input_ids == self.config.image_gen_pad_token_id

        def spread(values_BL: torch.Tensor) -> torch.Tensor:
            """[B, L] -> [B, T-1]: to the image tokens' positions, dropping the first as TRL's shift does."""
            row = values_BL.new_zeros(at_BT.shape)
            return row.masked_scatter(at_BT, values_BL)[:, 1:]

        return ScoredOutput(
            log_probs=spread(log_probs_BLs.sum(-1, dtype=torch.float64)),
            entropy=spread(symbol_entropy(logits.detach(), symbols).sum(-1)),
            mean_logits=spread(logits.detach().float().mean(-1)),
            is_top1=spread(hits_BLs.all(-1)),
            log_probs_BK=scale_sums(log_probs_BLs.detach(), schedule),
            accuracy_BK=scale_means(hits_BLs.float(), schedule),
        )


class ImagePolicy(_ScoresPairs, Vargpt):
    """v1.1 as DPO sees it."""


class V1ImagePolicy(_ScoresPairs, VargptV1):
    """v1 as DPO sees it."""


POLICIES = {Vargpt: ImagePolicy, VargptV1: V1ImagePolicy}


class ImageDpoTrainer(Resumable, DPOTrainer):
    """TRL's trainer on precomputed image tokens and references. ``record``: see `PairOrder`."""

    survivors = ("step0_max_abs_logratio", "_total_train_tokens")

    def __init__(self, norm: str, pairs: PairTable, record: Path | None = None, **kwargs):
        super().__init__(train_dataset=pairs.rows, **kwargs)
        self.train_dataset, self.record = pairs, record
        del self.model.forward  # TRL replaces it by its fused text head; ours returns log-probabilities itself
        self.norm = norm
        self.measured: dict[str, list[float]] = defaultdict(list)
        self.step0_max_abs_logratio = 0.0

    def _get_train_sampler(self, *args) -> PairOrder:
        arguments, record = self.args, self.record if self.is_world_process_zero() else None
        batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        return PairOrder(self.train_dataset, arguments.max_steps, batch, arguments.seed, record)

    def _prepare_inputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Keep the references in float64: with DeepSpeed, the trainer casts all floats to the model's dtype."""
        exact = {key: value.to(self.args.device) for key, value in inputs.items() if value.dtype == torch.float64}
        return super()._prepare_inputs(inputs) | exact

    def _prepare_dataset(self, dataset, *args):
        return dataset  # already tokenised: bits

    def _precompute_ref_logps(self, dataset, name: str, batch_size: int):
        return dataset  # scored by the rollout workers, with the very weights that this policy starts from

    def _compute_loss(self, model, inputs, return_outputs):
        inputs = dict(inputs)
        references_BK = inputs.pop("ref_by_scale")
        tokens, bits = inputs["bits"].shape[1:]
        scale = log_prob_scale(self.norm, tokens, bits)
        for side in ("chosen", "rejected"):
            inputs[f"ref_{side}_logps"] = inputs[f"ref_{side}_logps"] * scale
        outputs = []

        def scored(**kwargs) -> ScoredOutput:
            output = model(**kwargs)
            output.log_probs = output.log_probs * scale
            outputs.append(output)
            return output

        loss = super()._compute_loss(scored, inputs, return_outputs)
        references_B = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]]) / scale
        self._assert_step0(outputs[0], references_B, loss)
        self._measure_scales(outputs[0], references_BK)
        return loss

    def _assert_step0(self, output: ScoredOutput, references_B: torch.Tensor, loss: torch.Tensor) -> None:
        """Before the first update the policy is the reference: log-ratios 0, sigmoid loss ln 2."""
        if self.state.global_step > 0 or not self.model.training:
            return
        worst = (output.log_probs_BK.sum(1) - references_B).abs().max().item()
        tolerance = STEP0_TOLERANCE[self.model.dtype]
        if not worst <= tolerance:
            raise RuntimeError(
                f"DPO step 0: policy and reference differ by {worst:.3g} nats, expected at most {tolerance:g}; "
                f"the references were scored with other weights, other bits or another dtype"
            )
        if self.loss_types == ["sigmoid"] and not math.isclose(loss.item(), math.log(2), abs_tol=tolerance):
            raise RuntimeError(f"DPO step 0: loss {loss.item():.6f}, expected ln 2 = {math.log(2):.6f}")
        self.step0_max_abs_logratio = max(self.step0_max_abs_logratio, worst)

    def _measure_scales(self, output: ScoredOutput, references_BK: torch.Tensor) -> None:
        chosen_PK, rejected_PK = (self.beta * (output.log_probs_BK - references_BK)).chunk(2)
        chosen_hits_PK, rejected_hits_PK = output.accuracy_BK.chunk(2)
        accuracy = f"{self.model.config.image_tokenizer_config.symbols.name}_accuracy"
        for name, values_PK in {
            "rewards/margins": chosen_PK - rejected_PK,
            f"{accuracy}/chosen": chosen_hits_PK,
            f"{accuracy}/rejected": rejected_hits_PK,
        }.items():
            for k, value in enumerate(self.accelerator.gather(values_PK).mean(0).tolist()):
                self.measured[f"{name}/scale_{k}"].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs |= {key: sum(values) / len(values) for key, values in self.measured.items()}
        self.measured.clear()
        super().log(logs, start_time)
