"""The job of image-tokenizer training, and its training checkpoints, which resume it bit for bit.

It runs on one rank, in fp32. A checkpoint has the layout of every other one (`learners.checkpoints`); its tensors are
those of `TokenizerTraining.state` and the random state of the batches.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from learners.checkpoints import Layout, mark, prune, write_layout
from learners.config import LearnerConfig
from learners.image_tokenizer import ImageBatches, TokenizerTraining
from learners.jobs import TokenizerJob, save_request, training_checkpoints
from vargpt_rl.common.failpoints import point
from vargpt_rl.storage.checkpoint import load_policy, save_checkpoint
from vargpt_rl.storage.files import atomic_dir, check_free_space

STATE = "state.safetensors"
"""File of the tensors of a checkpoint."""


def train_image_tokenizer(
    job: TokenizerJob, config: LearnerConfig, dtype: torch.dtype, write: Callable[[dict], None]
) -> dict:
    """Train the image tokenizer and save it in ``dtype``; ``write`` is given each step's line of the log.

    Returns first and last loss (means of ten steps), steps, seconds, and the images that could not be loaded.
    """
    torch.manual_seed(job.seed)
    tokenizer = load_policy(job.start, torch.float32).image_tokenizer
    batches = ImageBatches(job.source, job.keys, job.side, job.batch, job.seed)
    training = TokenizerTraining(tokenizer, batches, job.steps, job.lr)
    before = _restore(training, batches, job.resume) if job.resume else 0.0
    began = time.time() - before
    request = save_request(job.output)

    def on_step(step: int, loss: float) -> None:
        point(f"{job.output.name}/rank-0/step-{step}")
        write({"step": step, "loss": loss})
        due = config.save_every is not None and step % config.save_every == 0
        if (due or request.exists()) and step < job.steps:
            _save(training, batches, job, time.time() - began)
            prune(training_checkpoints(job.output), config.keep_last, config.keep_every)
            request.unlink(missing_ok=True)

    training.run(on_step)
    save_checkpoint(
        job.output / "final",
        {
            f"image_tokenizer.{name}": tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in tokenizer.state_dict().items()
        },
    )
    losses = training.losses
    return {
        "loss_first": sum(losses[:10]) / len(losses[:10]),
        "loss_last": sum(losses[-10:]) / len(losses[-10:]),
        "steps": len(losses),
        "seconds": time.time() - began,
        "failures": batches.failures,
    }


def _save(training: TokenizerTraining, batches: ImageBatches, job: TokenizerJob, seconds: float) -> None:
    step = len(training.losses)
    state = training.state() | {
        "batches": batches.generator.get_state(),
        "seconds": torch.tensor(seconds, dtype=torch.float64),
    }
    with atomic_dir(training_checkpoints(job.output) / f"checkpoint-{step:06d}") as folder:
        check_free_space(folder, sum(tensor.nbytes for tensor in state.values()))
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / STATE)
        write_layout(folder, Layout(ranks=1, micro_batch=job.batch, zero=0, seed=job.seed), step)
        mark(folder)


def _restore(training: TokenizerTraining, batches: ImageBatches, checkpoint: Path) -> float:
    """Go back to a checkpoint; return the seconds that were spent until then."""
    state = load_file(checkpoint / STATE)
    training.restore(state)
    batches.generator.set_state(state["batches"])
    return state["seconds"].item()
