"""Direct preference optimisation on image tokens alone: a ``trl.DPOTrainer`` whose loss is TRL's own.

The log-likelihood of an image is the sum over its bits (VARGPT-v1.1, eq. 4), in v1 over its indices, at the positions
of its image tokens; the completion mask is the image-token mask. The sum may be weighted by scale
(`vargpt_rl.losses.credit`), for policy and reference alike. The rollout workers scored the references by scale; they
come with the pairs. No image is encoded or decoded here, and neither the text head nor a reference model is run.

Deviations from the published code (specification, section 9): policy and reference score the same bits, with no bit
flips, no condition drop and no drop path, so that at step 0 every log-ratio is zero. That is asserted, in training.

Shape legend: P pairs, B = 2P rows ordered [chosen, rejected], T positions, L image tokens, K scales, k trained scales.
"""

import math
from collections import defaultdict
from pathlib import Path

import torch
from trl import DPOTrainer

from learners.config import DpoConfig
from learners.flops import shape_of, step_flops
from learners.image_policy import ScoredOutput, sum_tolerance
from learners.pairs import PairOrder, PairTable
from learners.reference import StartWeights
from learners.resume import Resumable
from learners.step_times import TimedSteps
from learners.training import ExactInputs
from vargpt_rl.losses.credit import scale_credit, token_credit, weighted_sum


def log_prob_scale(norm: str, tokens: int, bits: int) -> float:
    """Factor of a summed log-probability under ``logp_norm``; ``tokens`` counts the trained tokens."""
    return {"sum": 1.0, "per_token": 1 / tokens, "per_bit": 1 / (tokens * bits)}[norm]


class ImageDpoTrainer(ExactInputs, TimedSteps, Resumable, DPOTrainer):
    """TRL's trainer on precomputed image tokens and references. ``record``: see `PairOrder`.

    ``settings.credit_scales`` below the number of scales needs a collator that leaves out the finer scales. With a
    ``reference``, references are scored here, and the workers' are compared with them at step 0.
    """

    survivors = ("step0_max_abs_logratio", "_total_train_tokens")

    def __init__(
        self,
        settings: DpoConfig,
        pairs: PairTable,
        record: Path | None = None,
        reference: StartWeights | None = None,
        **kwargs,
    ):
        super().__init__(train_dataset=pairs.rows, **kwargs)
        self.train_dataset = pairs
        self.record = record
        self.reference = reference
        del self.model.forward  # TRL replaces it by its fused text head; ours returns log-probabilities itself
        self.settings = settings
        self.measured: dict[str, list[float]] = defaultdict(list)
        self.step0_max_abs_logratio = 0.0

    def seconds_waited(self) -> float:
        return self.train_dataset.waited

    def count_flops(self, inputs: dict[str, torch.Tensor]) -> int:
        schedule = self.model.image_tokenizer.schedule_for(int(inputs["resolution"]))[: self.settings.credit_scales]
        return step_flops(self.model, shape_of(self.model, inputs["input_ids"], schedule))

    def _get_train_sampler(self, *args) -> PairOrder:
        arguments, record = self.args, self.record if self.is_world_process_zero() else None
        batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        return PairOrder(self.train_dataset, arguments.max_steps, batch, arguments.seed, record)

    def _prepare_dataset(self, dataset, *args):
        return dataset  # already tokenised: bits

    def _precompute_ref_logps(self, dataset, name: str, batch_size: int):
        return dataset  # scored by the rollout workers, with the very weights that this policy starts from

    def _compute_loss(self, model, inputs, return_outputs):
        inputs = dict(inputs)
        references_BK = inputs.pop("ref_by_scale")
        tokens, bits = inputs["bits"].shape[1:]
        schedule = self.model.image_tokenizer.schedule_for(int(inputs["resolution"]))
        scales = self.settings.credit_scales
        credit_K = scale_credit(schedule, self.settings.credit_alpha, scales)
        credit_L = token_credit(schedule, self.settings.credit_alpha, scales)[:tokens].to(references_BK.device)
        tolerance = sum_tolerance(self.model, schedule, credit_K)
        # From the unweighted total, so that weights of 1 change no digit of it.
        change_B = weighted_sum(references_BK, credit_K - 1)
        references_B = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]]) + change_B
        if self.reference is not None:
            workers_B = references_B
            references_BK = self._score_reference(self.reference, inputs)
            references_B = weighted_sum(references_BK, credit_K)
            self._assert_equal_at_step0(workers_B, references_B, "the workers' reference and the learner's", tolerance)
        scale = log_prob_scale(self.settings.logp_norm, tokens, bits)
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = (references_B * scale).chunk(2)
        outputs = []

        def scored(**kwargs) -> ScoredOutput:
            output = model(**kwargs, credit_L=credit_L, scales=scales)
            output.log_probs = output.log_probs * scale
            outputs.append(output)
            return output

        loss = super()._compute_loss(scored, inputs, return_outputs)
        outputs[0].log_probs_BK = outputs[0].log_probs_BK.detach()
        log_probs_B = weighted_sum(outputs[0].log_probs_BK, credit_K)
        worst = self._assert_equal_at_step0(log_probs_B, references_B, "policy and reference", tolerance)
        self._assert_first_loss(loss, self.beta * tolerance)
        self.step0_max_abs_logratio = max(self.step0_max_abs_logratio, worst)
        self._measure_scales(outputs[0], references_BK)
        return loss

    def _score_reference(self, reference: StartWeights, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities by scale [B, k] under the weights that training started from."""
        given = {name: inputs[name] for name in ("input_ids", "attention_mask", "bits", "resolution")}
        with reference.in_force():
            log_probs_BK = self.model(**given, scales=self.settings.credit_scales).log_probs_BK
        assert log_probs_BK is not None  # a policy returns all scores
        return log_probs_BK

    @property
    def _is_at_step0(self) -> bool:
        return self.state.global_step == 0 and self.model.training

    def _assert_equal_at_step0(
        self, found_B: torch.Tensor, expected_B: torch.Tensor, names: str, tolerance: float
    ) -> float:
        """Before the first update log-ratios are 0. Return the largest, in nats; 0 after the first update."""
        if not self._is_at_step0:
            return 0.0
        worst = (found_B - expected_B).abs().max().item()
        if not worst <= tolerance:
            raise RuntimeError(
                f"DPO step 0: {names} differ by {worst:.3g} nats, expected at most {tolerance:.3g}; "
                f"the references were scored with other weights, other bits or another dtype"
            )
        return worst

    def _assert_first_loss(self, loss: torch.Tensor, tolerance: float) -> None:
        """Before the first update the sigmoid loss is ln 2."""
        at_ln2 = math.isclose(loss.item(), math.log(2), abs_tol=tolerance)
        if self._is_at_step0 and self.loss_types == ["sigmoid"] and not at_ln2:
            raise RuntimeError(f"DPO step 0: loss {loss.item():.6f}, expected ln 2 = {math.log(2):.6f}")

    def _measure_scales(self, output: ScoredOutput, references_BK: torch.Tensor) -> None:
        """Margins (unweighted) and accuracies by scale."""
        assert output.log_probs_BK is not None and output.accuracy_BK is not None  # a policy returns all scores
        references_Bk = references_BK[:, : output.log_probs_BK.shape[1]]
        chosen_PK, rejected_PK = (self.beta * (output.log_probs_BK - references_Bk)).chunk(2)
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
