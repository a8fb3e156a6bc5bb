"""Saving and loading training checkpoints: an interrupted stage resumes bitwise as if it had never stopped.

A checkpoint is a folder ``checkpoint-NNNNNN`` with DeepSpeed's files (trained weights and optimizer state, one file per
rank; frozen weights come from the stage's start), the trainer's state, the learning-rate schedule, and each rank's
random-generator states and position in the data. It is written under a temporary name, synced, marked complete
(``learners.checkpoints``) and renamed; older ones are removed afterwards. Loading unpickles only tensors and the
classes in ``HARMLESS``.
"""

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from transformers import TrainerCallback
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from learners.average import AverageWeights
from learners.checkpoints import mark, prune
from vargpt_rl.common.failpoints import point
from vargpt_rl.storage.files import check_free_space, replace_dir, sync_tree

if TYPE_CHECKING:
    from transformers import Trainer as MixedInto
else:
    MixedInto = object

HARMLESS = [LossScaler, ZeroStageEnum, fragment_address]
"""Classes in DeepSpeed's files that only hold plain values."""


class SafeReader(TorchCheckpointEngine):
    """Loads DeepSpeed's files without running code from them."""

    def load(self, path: str, map_location=None):
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location=map_location, weights_only=True)


class SaveEvery(TrainerCallback):
    """Save a checkpoint every ``steps`` steps, and after the step during which the file ``request`` appears.

    None after the last step, when the stage's weights are saved. The request is removed once it is served.
    """

    def __init__(self, steps: int | None, request: Path):
        self.steps = steps
        self.request = request

    def on_step_end(self, args, state, control, **kwargs):
        requested = torch.tensor(int(self.request.exists()), device=args.device)
        dist.broadcast(requested, 0)  # the file may appear after some ranks have looked
        due = self.steps is not None and state.global_step % self.steps == 0
        control.should_save = (due or bool(requested)) and state.global_step < state.max_steps

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.request.unlink(missing_ok=True)


def checkpoint_bytes(model: torch.nn.Module) -> int:
    """Approximate size of a checkpoint: each trained weight, its fp32 copy and AdamW's two moments."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return sum(getattr(each, "ds_numel", each.numel()) * (each.element_size() + 12) for each in trained)


class Resumable(MixedInto):
    """Mixin that gives a ``transformers.Trainer`` under DeepSpeed these checkpoints; precedes it among the bases."""

    loader = None
    """This rank's own stateful data loader; without one, the trainer skips the examples already used."""
    survivors: tuple[str, ...] = ()
    """Names of numeric attributes of this rank that are saved and restored."""
    began = 0.0
    """Start of training (``time.time()``), shifted so that time between runs does not count."""
    average: AverageWeights | None = None
    """Moving average of the trained tensors, saved and restored with them."""
    keep: tuple[int, int | None] = (2, None)
    """Arguments of `learners.checkpoints.prune`: number of newest checkpoints kept, and step interval kept for good."""

    def _rank_file(self, folder: Path) -> Path:
        return folder / f"rank-{self.args.process_index}.json"

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step:06d}"
        unfinished = folder.with_name(f".{folder.name}")
        main = self.is_world_process_zero()
        if main:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            check_free_space(unfinished, checkpoint_bytes(self.model))
        stage = folder.parents[1].name
        point(f"{stage}/rank-{self.args.process_index}/save")
        self.accelerator.wait_for_everyone()
        self.deepspeed.save_checkpoint(str(unfinished), exclude_frozen_parameters=True)
        self._save_rng_state(str(unfinished))
        data = None if self.loader is None else self.loader.state_dict()
        kept = {name: getattr(self, name) for name in self.survivors}
        own = {"kept": kept, "seconds": time.time() - self.began, "data": data}
        self._rank_file(unfinished).write_text(json.dumps(own))
        if main:
            torch.save(self.lr_scheduler.state_dict(), unfinished / SCHEDULER_NAME)
            self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
            if self.average is not None:
                self.average.save(unfinished)
        self.accelerator.wait_for_everyone()
        sync_tree(unfinished)  # on every rank: each may run on its own machine
        self.accelerator.wait_for_everyone()
        if main:
            mark(unfinished)
            point(f"{stage}/checkpoint/marked")
            replace_dir(unfinished, folder)
            point(f"{stage}/checkpoint/there")
            prune(folder.parent, *self.keep)
        self.accelerator.wait_for_everyone()

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """As the trainer does, except that checkpoints are loaded without the frozen weights."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.began = time.time()
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            self.deepspeed.checkpoint_engine = SafeReader()
            if self.deepspeed.load_checkpoint(str(folder), load_module_strict=False)[0] is None:
                raise RuntimeError(f"{folder}: DeepSpeed found no checkpoint in it")
            self._load_optimizer_and_scheduler(str(folder))  # only the schedule: DeepSpeed restored the optimizer
            own = json.loads(self._rank_file(folder).read_text())
            for name, value in own["kept"].items():
                setattr(self, name, value)
            self.began -= own["seconds"]
            if self.average is not None:
                self.average.load(folder)
            if self.loader is not None:
                self.loader.load_state_dict(own["data"])
        return prepared
