"""Saving and loading training checkpoints: an interrupted stage resumes bitwise as if it had never stopped.

A checkpoint is a folder ``checkpoint-NNNNNN`` with the trained weights and the optimizer's state (``learners.shards``;
frozen weights come from the stage's start), the trainer's state, the learning-rate schedule, and each rank's
random-generator states and position in the data. It is written under a temporary name, synced, marked complete
(``learners.checkpoints``) and renamed; older ones are removed afterwards. What is pickled is loaded as plain values.

Other ranks, micro-batches or another ZeRO stage may resume it. Weights, optimizer and schedule are then the same, but
sums are rounded in another order. With other ranks or micro-batches, supervised stages also read their examples in a
new random order, and their noise is new; batches of pairs and of an online method stay the same.
"""

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from learners.average import AverageWeights
from learners.checkpoints import Layout, mark, prune, read_layout, write_layout
from learners.shards import SavedShards, load_shards, load_weights, save_shards, updates
from vargpt_rl.common.failpoints import point
from vargpt_rl.storage.files import check_free_space, replace_dir, sync_tree

if TYPE_CHECKING:
    from transformers import Trainer as MixedInto
else:
    MixedInto = object


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
    """Approximate size of a checkpoint: fp32 weights and AdamW's two moments."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return sum(12 * getattr(each, "ds_numel", each.numel()) for each in trained)


class Resumable(MixedInto):
    """Mixin that gives a ``transformers.Trainer`` under DeepSpeed these checkpoints; precedes it among the bases."""

    loader = None
    """This rank's own stateful data loader; without one, the trainer skips the examples already used."""
    survivors: tuple[str, ...] = ()
    """Names of numeric attributes of this rank that are saved and restored. Other ranks take the largest of all."""
    layout: Layout
    """How the job is shared by its ranks."""
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
        save_shards(self.deepspeed, unfinished)
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
            write_layout(unfinished, self.layout, updates(self.deepspeed))
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
        """As the trainer does, except that checkpoints are these."""
        if resume_from_checkpoint is None:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
            self.began = time.time()
            return prepared
        folder = Path(resume_from_checkpoint)
        saved = SavedShards(folder)
        load_weights(self.model, saved)  # before the engine copies or splits them
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        layout, made = read_layout(folder)
        load_shards(self.deepspeed, saved, made, self.layout.shards_as(layout))
        self._load_optimizer_and_scheduler(str(folder))  # only the schedule
        for group, rate in zip(
            self.deepspeed.basic_optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True
        ):
            group["lr"] = rate
        self.began = time.time()
        if self.average is not None:
            self.average.load(folder)
        self._resume_own(folder, layout)
        return prepared

    def _resume_own(self, folder: Path, layout: Layout) -> None:
        """Load what each rank has of its own, from a checkpoint that was saved with this layout."""
        files = [folder / f"rank-{rank}.json" for rank in range(layout.ranks)]
        ranks = [json.loads(path.read_text()) for path in files]
        if self.layout.reads_as(layout):
            own = ranks[self.args.process_index]
            kept = own["kept"]
            if self.loader is not None:
                self.loader.load_state_dict(own["data"])
        else:
            kept = {name: max(own["kept"][name] for own in ranks) for name in self.survivors}
            torch.manual_seed(self.layout.seed + self.args.process_index)
        for name, value in kept.items():
            setattr(self, name, value)
        self.began -= ranks[0]["seconds"]
