"""Shared by all trainers: training arguments, DeepSpeed configuration, and saving trained weights."""

from collections.abc import Container
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import deepspeed
import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback

from learners.average import AverageWeights
from learners.config import OPTIMIZERS, Recipe
from vargpt_rl.storage.checkpoint import save_checkpoint

if TYPE_CHECKING:
    from transformers import Trainer as MixedInto
else:
    MixedInto = object

LINEAR = torch.nn.functional.linear
"""PyTorch's own ``linear``. ZeRO-3 replaces it by one that rounds differently, and never restores it."""


def training_arguments(recipe: Recipe, ranks: int, seed: int, output: Path, use_gpu: bool, bf16: bool) -> dict:
    """Arguments shared by ``TrainingArguments`` and ``DPOConfig``. Saving and reporting are left to the caller."""
    return dict(
        output_dir=str(output),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=recipe.accumulation(ranks),
        learning_rate=recipe.lr,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=round(recipe.warmup_ratio * recipe.steps),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        gradient_checkpointing=recipe.gradient_checkpointing > 0,
        gradient_checkpointing_kwargs={"every_n_layers": max(1, recipe.gradient_checkpointing)},
        deepspeed=deepspeed_config(recipe, bf16),
        **_optimizer(recipe),
        bf16=bf16,
        use_cpu=not use_gpu,
        seed=seed,
        data_seed=seed,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=use_gpu,
    )


def _optimizer(recipe: Recipe) -> dict[str, str]:
    """The argument that names another optimizer than torch's AdamW, if the recipe asks for one."""
    name = OPTIMIZERS[recipe.optimizer]
    return {} if name is None else {"optim": name}


def deepspeed_config(recipe: Recipe, bf16: bool) -> dict:
    """ZeRO with an optimizer from the training arguments, which give the rest too.

    Offloaded, torch's fused AdamW updates on the CPU. DeepSpeed's own is no faster, has to be compiled at the first
    start, and rounds differently after a resume.
    """
    zero: dict[str, object] = {"stage": recipe.zero}
    if recipe.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
    }


class ExactInputs(MixedInto):
    """Mixin that keeps the float64 inputs of a ``transformers.Trainer``; must precede it among the bases.

    With DeepSpeed, the trainer casts all floats to the model's dtype, too coarse for sums of log-probabilities.
    """

    def _prepare_inputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        exact = {key: value.to(self.args.device) for key, value in inputs.items() if value.dtype == torch.float64}
        return super()._prepare_inputs(inputs) | exact


def gather_weights(model: PreTrainedModel, names: list[str], main: bool) -> dict[str, torch.Tensor]:
    """Copies of the named parameters on the main rank (empty elsewhere); under ZeRO-3 one parameter at a time."""
    parameters, copies = dict(model.named_parameters()), {}
    for name in names:
        parameter = parameters[name]
        gathered = [parameter] if hasattr(parameter, "ds_id") else []
        with deepspeed.zero.GatheredParameters(gathered, enabled=bool(gathered)):
            if main:
                copies[name] = parameter.detach().to("cpu", copy=True)
    return copies


def in_force(average: AverageWeights | None) -> AbstractContextManager[None]:
    """Compute with an average, if there is one, instead of the trained tensors."""
    return nullcontext() if average is None else average.in_force()


class SaveAt(TrainerCallback):
    """Save the trained tensors, or their ``average``, at given steps, under ``folder/step-NNNNNN``."""

    def __init__(
        self,
        trainer: Trainer,
        names: list[str],
        folder: Path,
        steps: Container[int],
        average: AverageWeights | None = None,
    ):
        self.trainer = trainer
        self.names = names
        self.folder = folder
        self.steps = steps
        self.average = average

    def on_train_begin(self, args, state, control, **kwargs):
        self.on_step_end(args, state, control)  # step 0 too, if it is asked for

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            save_trained(self.trainer, self.names, self.folder / f"step-{state.global_step:06d}", self.average)


def save_trained(trainer: Trainer, names: list[str], directory: Path, average: AverageWeights | None = None) -> None:
    """Write the trained tensors, or their ``average``, as a checkpoint; every rank must call it."""
    main = trainer.is_world_process_zero()
    with in_force(average):
        tensors = gather_weights(trainer.accelerator.unwrap_model(trainer.model), names, main)
    if main:
        save_checkpoint(directory, tensors)
    trainer.accelerator.wait_for_everyone()


def finish(trainer: Trainer) -> None:
    """Destroy DeepSpeed's engine, so that the process can train the next stage with a new one.

    Dropping the last reference to a data loader ends its worker processes.
    """
    trainer.deepspeed.destroy()
    torch.nn.functional.linear = LINEAR
    trainer.loader = trainer.callback_handler.train_dataloader = None
    trainer.accelerator.free_memory()
