"""Policy gradients on image tokens: GRPO and rejection-sampling fine-tuning, on batches that arrive while it trains.

The driver draws a batch with the current weights, turns rewards into advantages and writes the batch to a file; this
trainer takes one or more steps on it, saves the trained weights for the workers, and waits for the next one. Model and
optimizer stay in memory throughout. Losses and their sources: `vargpt_rl.losses.policy_gradient`.

A drawing that the current weights drew must have a ratio of 1: the trainer recomputes the log-probability that its
worker gave it, and stops training if they differ by more than rounding. This catches wrong weights, bits or sampling
settings before they poison the policy.

Shape legend: N drawings, L image tokens, K scales, k trained scales.
"""

from collections import defaultdict

import torch
from transformers import Trainer, TrainerControl

from learners.config import RlConfig
from learners.image_policy import RESHAPED_TOLERANCE
from learners.methods import OnlineMethod, ScoredImages
from learners.policy_batches import PolicyBatches
from learners.resume import Resumable
from learners.training import ExactInputs
from vargpt_rl.losses.credit import scale_credit, token_credit, weighted_sum
from vargpt_rl.losses.policy_gradient import kl_k3


class PolicyGradientTrainer(ExactInputs, Resumable, Trainer):
    """Train a policy (`learners.image_policy`) on its images: by an online method."""

    survivors = ("first_update_max_abs_log_ratio",)

    def __init__(self, settings: RlConfig, batches: PolicyBatches, method: OnlineMethod, **kwargs):
        super().__init__(**kwargs)
        self.settings = settings
        self.batches = batches
        self.method = method
        self.first_update_max_abs_log_ratio = 0.0
        self.measured: dict[str, list[torch.Tensor]] = defaultdict(list)
        batches.on_save_request = self._save_now

    def get_train_dataloader(self) -> PolicyBatches:
        return self.batches

    def _prepare_for_training(self, *args):
        self.batches.first_step = self.state.global_step  # of the checkpoint, if training resumes
        return super()._prepare_for_training(*args)

    def _save_now(self) -> None:
        """Save a training checkpoint while waiting for a batch, unless no step was taken yet."""
        if self.state.global_step:
            self._save_checkpoint(self.model, trial=None)
        self.control: TrainerControl = self.callback_handler.on_save(self.args, self.state, self.control)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> torch.Tensor:
        settings = self.settings
        schedule = self.model.image_tokenizer.schedule_for(int(inputs["resolution"]))
        credit_K = scale_credit(schedule, settings.credit_alpha, settings.credit_scales)
        credit_L = token_credit(schedule, settings.credit_alpha, settings.credit_scales)
        tokens, symbols = inputs["bits"].shape[1:]
        tau = inputs["tau"].item()
        output = model(
            inputs["input_ids"],
            inputs["attention_mask"],
            inputs["bits"],
            inputs["resolution"],
            credit_L=credit_L[:tokens].to(self.args.device),
            scales=settings.credit_scales,
            tau=tau,
        )
        terms = tokens * symbols
        log_prob_N = output.log_probs.sum(1) / terms
        weight_N = inputs["weight"]
        metrics = {
            "log_prob": log_prob_N.detach(),
            "entropy": output.entropy.sum(1) / terms,
            "staleness": self.state.global_step - inputs["learner_step"],
        }
        wanted = self.method.takes | ({"reference"} if settings.kl else set())
        given_N = {name: weighted_sum(_required(inputs, f"{name}_by_scale"), credit_K) for name in wanted}
        if "sampler" in given_N:
            difference_N = weighted_sum(output.log_probs_BK, credit_K) - given_N["sampler"]
            self._assert_first_update(difference_N, inputs["learner_step"], tau)
        images = ScoredImages(
            log_prob=log_prob_N,
            advantage=inputs["advantage"],
            **{name: values_N / terms for name, values_N in given_N.items()},
        )
        loss_N, found = self.method.loss(images, settings)
        metrics |= found
        if settings.kl:
            assert images.reference is not None  # wanted above
            kl_N = kl_k3(log_prob_N, images.reference)
            loss_N = loss_N + settings.kl * kl_N
            metrics["kl"] = kl_N.detach()
        for name, values_N in metrics.items():
            self.measured[name].append((values_N * weight_N).mean())
        if "ratio" in metrics:
            self.measured["ratio/max"].append((metrics["ratio"] * (weight_N > 0)).max())
        return (loss_N * weight_N).mean()

    def _assert_first_update(self, difference_N: torch.Tensor, learner_step_N: torch.Tensor, tau: float) -> None:
        """RuntimeError unless drawings of the current weights have the log-probabilities, in nats, they came with."""
        current_N = learner_step_N == self.state.global_step
        if not self.model.training or not current_N.any():
            return
        worst = difference_N[current_N].abs().max().item()
        tolerance = RESHAPED_TOLERANCE[self.model.dtype] / min(tau, 1.0)
        if not worst <= tolerance:
            raise RuntimeError(
                f"policy gradient, step {self.state.global_step}: log-probabilities of drawings of the current weights "
                f"differ by {worst:.3g} nats from those they came with, expected at most {tolerance:g} (a ratio of 1); "
                f"they were scored with other weights, other bits, another temperature or another dtype"
            )
        self.first_update_max_abs_log_ratio = max(self.first_update_max_abs_log_ratio, worst)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name, values in self.measured.items():
            found = self.accelerator.gather(torch.stack(values).double())
            logs[name] = (found.max() if name.endswith("/max") else found.mean()).item()
        self.measured.clear()
        super().log(logs, start_time)


def _required(inputs: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in inputs:
        raise ValueError(f"batch of drawings: {name} is empty, expected log-probabilities by scale")
    return inputs[name]
