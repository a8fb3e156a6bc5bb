"""Training checkpoints: a stage that was cut off goes on from the last one, as if it had never stopped.

A checkpoint is a folder ``checkpoint-NNNNNN`` with DeepSpeed's files (trained weights and optimizer, a file a rank;
frozen weights are those that the stage starts from), the trainer's state, the learning-rate schedule, and for each
rank its generators' states and its place in the data. It is made under a temporary name, synced, given its marker
(``learners.checkpoints``) and renamed; older ones go afterwards. Nothing in it is unpickled but tensors and what is
listed in ``HARMLESS``.
"""

import json
import os
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from transformers import TrainerCallback
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from learners.checkpoints import mark, prune
from vargpt_rl.common.failpoints import point
from vargpt_rl.storage.files import check_room, sync

HARMLESS = [LossScaler, ZeroStageEnum, fragment_address]
"""Classes in DeepSpeed's files that hold plain values."""


class SafeReader(TorchCheckpointEngine):
    """Reads DeepSpeed's files without running code from them."""

    def load(self, path: str, map_location=None):
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location=map_location, weights_only=True)


class SaveEvery(TrainerCallback):
    """Ask for a checkpoint after every so many steps, and after that in which a file ``asked`` appears.

    Not after the last one: the stage's weights are saved then. The file goes when the checkpoint is there.
    """

    def __init__(self, steps: int | None, asked: Path):
        self.steps, self.asked = steps, asked

    def on_step_end(self, args, state, control, **kwargs):
        asked = torch.tensor(int(self.asked.exists()), device=args.device)
        dist.broadcast(asked, 0)  # the file may appear between two ranks' looks
        due = self.steps is not None and state.global_step % self.steps == 0
        control.should_save = (due or bool(asked)) and state.global_step < state.max_steps

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.asked.unlink(missing_ok=True)


def checkpoint_bytes(model: torch.nn.Module) -> int:
    """Size of a checkpoint, nearly: of each trained weight itself, its fp32 copy and AdamW's two moments."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return sum(getattr(each, "ds_numel", each.numel()) * (each.element_size() + 12) for each in trained)


class Resumable:
    """For a ``transformers.Trainer`` under DeepSpeed: checkpoints as above. Comes before the trainer among the bases.

    ``loader`` is this rank's own stateful loader, where there is one; else the trainer skips what was trained on.
    ``keep``: how many of the last checkpoints stay, and after how many steps each stays besides.
    ``survivors`` names attributes of this rank, numbers, that are kept. ``began``: when training did, without the time
    between starts.
    """

    loader = None
    survivors: tuple[str, ...] = ()
    began = 0.0
    keep: tuple[int, int | None] = (2, None)

    def _rank_file(self, folder: Path) -> Path:
        return folder / f"rank-{self.args.process_index}.json"

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step:06d}"
        unfinished, main = folder.with_name(f".{folder.name}"), self.is_world_process_zero()
        if main:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            check_room(unfinished, checkpoint_bytes(self.model))
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
        self.accelerator.wait_for_everyone()
        for path in (unfinished, *unfinished.rglob("*")):  # on every rank: they may run on machines of their own
            sync(path)
        self.accelerator.wait_for_everyone()
        if main:
            mark(unfinished)
            point(f"{stage}/checkpoint/marked")
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier start, damaged
            os.replace(unfinished, folder)
            sync(folder.parent)
            point(f"{stage}/checkpoint/there")
            prune(folder.parent, *self.keep)
        self.accelerator.wait_for_everyone()

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """The trainer's own, but for the reading of checkpoints, which would want frozen weights as well."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.began = time.time()
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            self.deepspeed.checkpoint_engine = SafeReader()
            if self.deepspeed.load_checkpoint(str(folder), load_module_strict=False)[0] is None:
                raise RuntimeError(f"{folder}: DeepSpeed finds no checkpoint in it")
            self._load_optimizer_and_scheduler(str(folder))  # the schedule: DeepSpeed has the optimizer
            own = json.loads(self._rank_file(folder).read_text())
            for name, value in own["kept"].items():
                setattr(self, name, value)
            self.began -= own["seconds"]
            if self.loader is not None:
                self.loader.load_state_dict(own["data"])
        return prepared
