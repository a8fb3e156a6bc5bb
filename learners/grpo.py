"""Online methods on image tokens (`learners.methods`): training on batches of images that arrive while it trains.

The driver draws a batch with the current weights, turns rewards into advantages and writes the batch to a file; this
trainer takes one or more steps on it, saves the trained weights for the workers, and waits for the next one. Model and
optimizer stay in memory throughout. Losses and their sources: `vargpt_rl.losses.policy_gradient`.

An image that the current weights drew must have a ratio of 1: the trainer recomputes the log-probability that its
worker gave it, and stops training if they differ by more than rounding. This catches wrong weights, bits or sampling
settings before they poison the policy.

Shape legend: N images (B in the model's output), L image tokens, K scales, k trained scales, P parts of an image (runs
of scales).
"""

from collections import defaultdict

import torch
from transformers import Trainer, TrainerControl

from learners.config import RlConfig
from learners.flops import shape_of, step_flops
from learners.image_policy import sum_tolerance
from learners.methods import OnlineMethod, ScoredImages
from learners.policy_batches import PolicyBatches
from learners.reference import StartWeights
from learners.resume import Resumable
from learners.step_times import TimedSteps
from learners.training import ExactInputs
from vargpt_rl.losses.credit import part_means, scale_credit, weighted_sum
from vargpt_rl.losses.policy_gradient import kl_k3


class PolicyGradientTrainer(ExactInputs, TimedSteps, Resumable, Trainer):
    """Train a policy (`learners.image_policy`) on its images: by an online method.

    With a ``reference``, the reference is scored here; otherwise its scores come with the batches.
    """

    survivors = ("first_update_max_abs_log_ratio",)

    def __init__(
        self,
        settings: RlConfig,
        batches: PolicyBatches,
        method: OnlineMethod,
        reference: StartWeights | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.reference = reference
        self.settings = settings
        self.batches = batches
        self.method = method
        self.first_update_max_abs_log_ratio = 0.0
        self.measured: dict[str, list[torch.Tensor]] = defaultdict(list)
        batches.on_save_request = self._save_now

    def seconds_waited(self) -> float:
        return self.batches.waited

    def count_flops(self, inputs: dict[str, torch.Tensor]) -> int:
        schedule = self.model.image_tokenizer.schedule_for(int(inputs["resolution"]))[: self.settings.credit_scales]
        return step_flops(self.model, shape_of(self.model, inputs["input_ids"], schedule))

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
        tokens, symbols = inputs["bits"].shape[1:]
        mean_PK, share_P = part_means(schedule, credit_K, symbols, self.method.split(settings))
        mean_PK, share_P = mean_PK.to(self.args.device), share_P.to(self.args.device)
        tau = inputs["tau"].item()
        read = ("input_ids", "attention_mask", "bits", "resolution", "states")
        given = {name: inputs[name] for name in read if name in inputs}
        score = {"scales": settings.credit_scales, "tau": tau}
        step = self.state.global_step
        given_NK = self._given_log_probs(inputs, given, score)
        output = model(**given, **score)
        # The sampler of an image may have the current weights; before the first update, the reference has.
        drawn_at_N = inputs["learner_step"]
        current_N = {
            "sampler": drawn_at_N == step,
            "reference": torch.full_like(drawn_at_N, step == 0, dtype=torch.bool),
        }
        own_N = weighted_sum(output.log_probs_BK.detach(), credit_K)
        tolerance = sum_tolerance(self.model, schedule, credit_K) / min(tau, 1.0)
        for name, by_scale_NK in given_NK.items():
            difference_N = own_N - weighted_sum(by_scale_NK, credit_K)
            self._assert_equal(difference_N[current_N[name]], name, tolerance)
        images = ScoredImages(
            log_prob=_means(output.log_probs_BK, mean_PK),
            advantage=inputs["advantage"],
            reward=inputs["reward"],
            group=inputs["group"],
            terms=tokens * symbols,
            **{name: _means(by_scale_NK, mean_PK) for name, by_scale_NK in given_NK.items()},
        )
        loss_NP, found = self.method.loss(images, settings)
        if settings.kl:
            assert images.reference is not None  # wanted above
            kl_NP = kl_k3(images.log_prob, images.reference)
            loss_NP = loss_NP + settings.kl * kl_NP
            found["kl"] = kl_NP.detach()
        found["log_prob"] = images.log_prob.detach()
        metrics = {name: (values_NP * share_P).sum(1) for name, values_NP in found.items()} | {
            "entropy": output.entropy.sum(1) / tokens,
            "staleness": step - drawn_at_N,
        }
        weight_N = inputs["weight"]
        for name, values_N in metrics.items():
            self.measured[name].append((values_N * weight_N).mean())
        if "ratio" in found:
            self.measured["ratio/max"].append((found["ratio"] * (weight_N > 0)[:, None]).max())
        return ((loss_NP * share_P).sum(1) * weight_N).mean()

    def _given_log_probs(self, inputs: dict, given: dict, score: dict) -> dict[str, torch.Tensor]:
        """Return what the loss takes besides the policy's log-probabilities: those of sampler and reference [N, K].

        The reference is scored here if this process has it (with the arguments ``given`` and ``score`` of the model);
        all others come with the batch.
        """
        wanted = self.method.takes | ({"reference"} if self.settings.kl else set())
        found = {}
        if self.reference is not None and "reference" in wanted:
            with self.reference.in_force():
                found["reference"] = self.model(**given, **score).log_probs_BK
        return found | {name: _required(inputs, f"{name}_by_scale") for name in wanted - found.keys()}

    def _assert_equal(self, difference_N: torch.Tensor, name: str, tolerance: float) -> None:
        """RuntimeError unless log-probabilities that must equal the policy's do so, up to rounding, in nats."""
        if not self.model.training or not len(difference_N):
            return
        worst = difference_N.abs().max().item()
        if not worst <= tolerance:
            raise RuntimeError(
                f"policy gradient, step {self.state.global_step}: log-probabilities of the {name}, which has the "
                f"current weights, differ by {worst:.3g} nats from the policy's, expected at most {tolerance:.3g} (a "
                f"ratio of 1); they were scored with other weights, other bits, another temperature or another dtype"
            )
        self.first_update_max_abs_log_ratio = max(self.first_update_max_abs_log_ratio, worst)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name, values in self.measured.items():
            found = self.accelerator.gather(torch.stack(values).double())
            logs[name] = (found.max() if name.endswith("/max") else found.mean()).item()
        self.measured.clear()
        super().log(logs, start_time)


def _means(log_probs_NK: torch.Tensor, mean_PK: torch.Tensor) -> torch.Tensor:
    """Return [N, P] means of sums by scale, from which the finer scales may be missing."""
    return log_probs_NK.double() @ mean_PK[:, : log_probs_NK.shape[1]].T


def _required(inputs: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in inputs:
        raise ValueError(f"batch of images: {name} is empty, expected log-probabilities by scale")
    return inputs[name]
