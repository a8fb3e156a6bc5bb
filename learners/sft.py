"""Supervised training of any stage: a ``transformers.Trainer`` whose loss is ``vargpt_rl.losses.supervised.sft_loss``.

Batches come from a `vargpt_rl.data.records.stream.RecordStream`. Each micro-batch has the same share of images to draw
and of questions, so every rank has gradients for the same parameters.

Shape legend: N images, H W pixels.
"""

import time
from collections import defaultdict

import torch
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from learners.flops import shape_of, step_flops
from learners.gradient_norms import EVERY, ModalityGradients
from learners.resume import Resumable
from learners.step_times import TimedSteps
from vargpt_rl.losses.supervised import modality_losses, sft_loss
from vargpt_rl.model.families import AnyImageTokenizer
from vargpt_rl.model.scales import STRIDE, Schedule
from vargpt_rl.model.unified import Unified
from vargpt_rl.stages import Stage


class SftTrainer(TimedSteps, Resumable, Trainer):
    """Trainer of one stage's losses on the batches of ``loader``, this rank's own.

    Every metric is the mean since the last log, over ranks; ``tokens/...`` is the sum. If the stage has two losses,
    the gradient norm of each is logged every `learners.gradient_norms.EVERY` steps; with one loss it equals
    ``grad_norm``.

    ``image_tokenizer``, not the copy in the model that trains, computes the features of images that come as pixels.
    """

    def __init__(
        self,
        stage: Stage,
        loader: StatefulDataLoader,
        image_tokenizer: AnyImageTokenizer | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.stage = stage
        self.loader = loader
        self.image_tokenizer = image_tokenizer and image_tokenizer.eval().to(self.args.device)
        self.measured: dict[str, list[float]] = defaultdict(list)
        self.gradients: ModalityGradients | None = None
        self.waited = 0.0
        self.since: float | None = None

    def get_batch_samples(self, *args):
        """Get the batches of a step. The share of a step spent waiting for them is logged as ``data_wait``."""
        began = time.perf_counter()
        self.since = self.since or began
        samples = super().get_batch_samples(*args)
        self.waited += time.perf_counter() - began
        return samples

    def count_flops(self, inputs: dict[str, torch.Tensor]) -> int:
        tokenizer = self.model.config.image_tokenizer_config
        schedule: Schedule = ()
        if "crops" in inputs:
            schedule = tokenizer.schedule_for(*inputs["crops"].shape[1:3])
        elif "features" in inputs:
            schedule = tokenizer.schedule_for(*(STRIDE * side for side in inputs["features"].shape[2:]))
        text_logits = self.stage.text_weight > 0
        return step_flops(self.model, shape_of(self.model, inputs["input_ids"], schedule, text_logits))

    def get_train_dataloader(self) -> StatefulDataLoader:
        return self.loader

    @torch.no_grad()
    def _features(self, crops_NHW3: torch.Tensor) -> torch.Tensor:
        """Encode uint8 [N, H, W, 3] to float16 [N, d, h, w], as rollout workers do."""
        assert self.image_tokenizer is not None  # without one no batch has crops
        images_N3HW = (
            (crops_NHW3.float() / 127.5 - 1).permute(0, 3, 1, 2).to(next(self.image_tokenizer.parameters()).dtype)
        )
        return self.image_tokenizer.features(images_N3HW).half()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> torch.Tensor:
        if "crops" in inputs:
            inputs = inputs | {"features": self._features(inputs["crops"])}
        both = self.stage.text_weight > 0 and "features" in inputs
        if both and self.state.global_step % EVERY == 0 and not is_deepspeed_zero3_enabled():
            self._measure(self.accelerator.unwrap_model(model), inputs)
        loss, metrics = sft_loss(model, inputs, self.stage.noise, self.stage.text_weight)
        for key, value in metrics.items():
            self.measured[key].append(value)
        return loss

    def _measure(self, model: Unified, inputs: dict[str, torch.Tensor]) -> None:
        """Add the micro-batch's gradient of each loss, with the noise that it is about to be trained with."""
        if self.gradients is None:
            self.gradients = ModalityGradients(model, self.args.gradient_accumulation_steps)
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            losses, _ = modality_losses(model, inputs, self.stage.noise, self.stage.text_weight)
        self.gradients.add(losses)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.measured:
            now = time.perf_counter()
            assert self.since is not None  # set by the first batch
            self.measured["data_wait"].append(self.waited / (now - self.since))
            self.waited, self.since = 0.0, now
            keys = sorted(self.measured)
            totals = torch.tensor([sum(self.measured[key]) for key in keys], device=self.accelerator.device)
            totals = self.accelerator.gather(totals[None]).sum(0).tolist()
            count = {key: len(self.measured[key]) * self.accelerator.num_processes for key in keys}
            logs |= {k: t if k.startswith("tokens/") else t / count[k] for k, t in zip(keys, totals, strict=True)}
            self.measured.clear()
        if self.gradients is not None:
            logs |= {f"grad_norm/{modality}": norm for modality, norm in self.gradients.norms().items()}
            self.gradients = None
        super().log(logs, start_time)
