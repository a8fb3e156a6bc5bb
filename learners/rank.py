"""One rank of a learner group: loads the model, trains one stage, hands the trained tensors out, and starts afresh.

Every stage gets a new trainer and a new DeepSpeed engine in the same process; the process group stays.
"""

import copy
import json
import os
import socket
import time
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import DPOConfig

from learners.config import Recipe
from learners.dpo import ImageDpoTrainer, ImagePolicy
from learners.image_tokenizer import picture_batches, train_image_tokenizer
from learners.jobs import DpoJob, SftJob, Start, TokenizerJob, training_checkpoints
from learners.resume import SaveEvery, last_checkpoint
from learners.sft import BalancedBatches, Drawings, Questions, SftTrainer
from learners.training import SaveAt, finish, save_trained, training_arguments
from vargpt_rl.checkpoint import load_weights_into, save_checkpoint
from vargpt_rl.data.batches import PairCollator, SftCollator
from vargpt_rl.data.preferences import read_table
from vargpt_rl.data.types import Probe
from vargpt_rl.model.bits import replay, unpack
from vargpt_rl.model.likelihood import bit_log_probs, picture_log_probs
from vargpt_rl.model.modeling import Drawing, Vargpt
from vargpt_rl.model.prompt import ChatFormat
from vargpt_rl.model.scales import schedule_for, token_count
from vargpt_rl.stages import STAGES, freeze


class WriteLog(TrainerCallback):
    """Append every log of the main rank to ``log.jsonl``, which the driver follows."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def write(self, line: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            self.write({"step": state.global_step, **logs})


class Rank:
    """A learner process. Plain class; ``learners.group`` makes it a Ray actor."""

    def __init__(self, rank: int, ranks: int, threads: int, use_gpu: bool, bf16: bool, save_every: int | None = None):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "HF_HUB_OFFLINE": "1"}
        self.rank, self.ranks, self.use_gpu, self.bf16, self.save_every = rank, ranks, use_gpu, bf16, save_every
        torch.set_num_threads(threads)

    def address(self) -> tuple[str, int]:
        """This host and a free port, for rank 0 to be met at."""
        with socket.socket() as free:
            free.bind(("", 0))
            return socket.gethostbyname(socket.gethostname()), free.getsockname()[1]

    def join(self, host: str, port: int) -> int:
        """Enter the process group; the process id."""
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
        # Without GPUs gloo serves; DeepSpeed would spend a minute compiling a shared-memory kernel at the first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("nccl" if self.use_gpu else "gloo", verbose=False)
        return os.getpid()

    def _model(self, kind: type[Vargpt], start: Start) -> Vargpt:
        model = kind.from_pretrained(start.model, dtype=torch.bfloat16 if self.bf16 else torch.float32)
        load_weights_into(model, start.weights)
        return model

    def _run(self, trainer, chat: ChatFormat, trained: list[str], probe: Probe, output: Path) -> dict:
        trainer.add_callback(WriteLog(output / "log.jsonl"))
        if self.save_every:
            trainer.add_callback(SaveEvery(self.save_every))
        checkpoint = last_checkpoint(training_checkpoints(output))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds = time.time() - trainer.began
        save_trained(trainer, trained, output / "final")
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        result = {
            "loss_first": losses[0],
            "loss_last": losses[-1],
            "steps": trainer.state.global_step,
            "seconds": seconds,
            "trained_tensors": len(trained),
            "probe": self._score(trainer, chat, probe),
        }
        finish(trainer)
        unset_hf_deepspeed_config()
        return result

    @torch.no_grad()
    def _score(self, trainer, chat: ChatFormat, probe: Probe) -> float:
        """Log-probability of the probe under the trained weights, in nats. All ranks take part (ZeRO-3 gathers)."""
        schedule, engine = schedule_for(probe.resolution), trainer.deepspeed
        engine.eval()
        tokens, depth = token_count(schedule), chat.config.image_tokenizer_config.bits
        bits = torch.from_numpy(unpack(probe.bits, tokens, depth))[None].to(engine.device)
        row = chat.pad([chat.drawn(probe.prompt.text, probe.prompt.reply, tokens).ids], "right", multiple=8)
        row = row.to(engine.device)
        mask = torch.ones_like(row)  # what the pads beyond the picture hold cannot reach it
        if isinstance(trainer, ImageDpoTrainer):
            return engine(row, mask, bits, torch.tensor(probe.resolution)).log_probs_BK.sum().item()
        drawing = Drawing(replay(bits, schedule, engine.module.dtype).inputs_BLd, (probe.resolution,) * 2)
        logits = engine(row, mask, drawing=drawing, text_logits=False).image_logits
        return picture_log_probs(bit_log_probs(logits, bits)).item()

    def _common(self, recipe: Recipe, seed: int, output: Path) -> dict:
        folder = training_checkpoints(output)
        return training_arguments(recipe, self.ranks, seed, folder, self.use_gpu, self.bf16)

    def _corpus(self, job: SftJob, chat: ChatFormat) -> dict:
        """Drawings that were encoded beforehand, and questions."""
        questions, share = None, 1.0
        if job.questions is not None:
            questions = Questions(job.questions.rows, job.questions.source, chat, job.questions.side)
            share = job.questions.drawing_share
        length = job.recipe.steps * job.recipe.batch
        rows = BalancedBatches(Drawings(job.corpus), questions, length, job.recipe.micro_batch, share, job.seed)
        return {"train_dataset": rows}

    def _streamed(self, job: SftJob, model: Vargpt, chat: ChatFormat) -> dict:
        """Records as they come, and what takes the features of their pictures if nobody did beforehand."""
        mixture = job.feed.mixture(chat, job.recipe.micro_batch, job.seed, self.rank, self.ranks)
        loader = job.feed.loader(mixture, job.seed, self.use_gpu)
        tokenizer = None if job.feed.encoded else copy.deepcopy(model.image_tokenizer)  # the model's own may be cut up
        return {"loader": loader, "image_tokenizer": tokenizer}

    def sft(self, job: SftJob) -> dict:
        """Train a supervised stage; losses, steps and seconds. Weights: ``output/final`` and ``output/step-*``."""
        torch.manual_seed(job.seed + self.rank)
        model = self._model(Vargpt, job.start)
        stage, chat = STAGES[job.stage], ChatFormat(job.start.model, model.config)
        trained = freeze(model, stage)
        trainer = SftTrainer(
            stage,
            model=model,
            args=TrainingArguments(
                **self._common(job.recipe, job.seed, job.output), ignore_data_skip=job.feed is not None
            ),
            data_collator=SftCollator(chat),
            **(self._streamed(job, model, chat) if job.feed else self._corpus(job, chat)),
        )
        trainer.add_callback(SaveAt(trainer, trained, job.output, list(job.save_steps)))
        return self._run(trainer, chat, trained, job.probe, job.output)

    def dpo(self, job: DpoJob) -> dict:
        """Train a preference stage; adds the last margin and accuracy and the largest log-ratio seen at step 0."""
        torch.manual_seed(job.seed + self.rank)
        model = self._model(ImagePolicy, job.start)
        trained = freeze(model, STAGES["dpo"])
        chat = ChatFormat(job.start.model, model.config)
        arguments = DPOConfig(
            **self._common(job.recipe, job.seed, job.output),
            beta=job.dpo.beta,
            loss_type=list(job.dpo.loss_type),
            loss_weights=job.dpo.loss_weights,
            label_smoothing=job.dpo.label_smoothing,
            precompute_ref_log_probs=True,
            max_length=None,
        )
        trainer = ImageDpoTrainer(
            norm=job.dpo.logp_norm,
            model=model,
            args=arguments,
            data_collator=PairCollator(chat),
            train_dataset=Dataset.from_pandas(read_table(job.table), preserve_index=False),
            processing_class=chat.tokenizer,
        )
        result = self._run(trainer, chat, trained, job.probe, job.output)
        last = next(entry for entry in reversed(trainer.state.log_history) if "rewards/margins" in entry)
        worst = torch.tensor([trainer.step0_max_abs_logratio], dtype=torch.float64)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        return result | {
            "margin_last": last["rewards/margins"],
            "accuracy_last": last["rewards/accuracies"],
            "step0_max_abs_logratio": worst.item(),
        }

    def tokenizer(self, job: TokenizerJob) -> dict:
        """Adapt the image tokenizer to pictures; a single process. First and last loss (means of ten steps)."""
        torch.manual_seed(job.seed)
        model, losses = self._model(Vargpt, job.start), []
        log = WriteLog(job.output / "log.jsonl")

        def on_step(step: int, loss: float) -> None:
            losses.append(loss)
            log.write({"step": step + 1, "loss": loss})

        batches, failures = picture_batches(job.source, job.keys, job.side, job.batch, job.seed)
        began = time.time()
        train_image_tokenizer(model.image_tokenizer, batches, job.steps, job.lr, on_step)
        save_checkpoint(
            job.output / "final",
            {f"image_tokenizer.{name}": tensor for name, tensor in model.image_tokenizer.state_dict().items()},
        )
        return {
            "loss_first": sum(losses[:10]) / len(losses[:10]),
            "loss_last": sum(losses[-10:]) / len(losses[-10:]),
            "steps": len(losses),
            "seconds": time.time() - began,
            "failures": failures,
        }
