"""One rank of a learner group: loads the model, trains one stage and saves the trained tensors, job after job.

Every job gets a new trainer and a new DeepSpeed engine in the same process; the process group stays.
"""

import copy
import json
import os
import socket
import time
from collections.abc import Container
from pathlib import Path

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.constants import default_pg_timeout
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import DPOConfig, RewardConfig

from learners.average import AverageWeights
from learners.config import LearnerConfig, Recipe
from learners.dpo import ImageDpoTrainer
from learners.flops import matrix_peak
from learners.grpo import PolicyGradientTrainer
from learners.image_policy import POLICIES
from learners.jobs import (
    DpoJob,
    Job,
    PolicyGradientJob,
    RewardJob,
    SftJob,
    TokenizerJob,
    TrainerJob,
    layout_of,
    save_request,
    training_checkpoints,
)
from learners.methods import ONLINE
from learners.pairs import PairTable
from learners.policy_batches import PolicyBatches
from learners.reference import StartWeights
from learners.resume import SaveEvery
from learners.reward import ShownImageRewardTrainer, pairs_dataset, train_parts
from learners.sft import SftTrainer
from learners.tokenizer_job import train_image_tokenizer
from learners.training import SaveAt, finish, in_force, save_trained, training_arguments
from vargpt_rl.common.failpoints import point
from vargpt_rl.common.memory import forget_peak, peak_memory
from vargpt_rl.common.rendezvous import rendezvous
from vargpt_rl.data.batches import PairCollator, PolicyBatchCollator
from vargpt_rl.data.reward_pairs import RewardPairCollator
from vargpt_rl.data.samples import Probe
from vargpt_rl.data.states import padded_states
from vargpt_rl.model.bits import unpack
from vargpt_rl.model.families import family_of, load_config, markup_for
from vargpt_rl.model.likelihood import image_log_probs, symbol_log_probs
from vargpt_rl.model.prompt import ChatTemplate
from vargpt_rl.model.scales import token_count
from vargpt_rl.model.unified import Unified, replayed
from vargpt_rl.stages import STAGES, freeze, frozen_parts
from vargpt_rl.storage.checkpoint import Policy, load_policy
from vargpt_rl.storage.reward_base import load_reward_model


class WriteLog(TrainerCallback):
    """Append every log entry of the main rank to ``log.jsonl``, which the driver follows."""

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


class FailAt(TrainerCallback):
    """The fail points ``name``/step-N, one after each step."""

    def __init__(self, name: str):
        self.name = name

    def on_step_end(self, args, state, control, **kwargs):
        point(f"{self.name}/step-{state.global_step}")


def interface(address: str) -> str:
    """The network interface that has this address. ValueError if none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if address in (entry.address for entry in addresses):
            return name
    raise ValueError(f"no network interface of {socket.gethostname()} has the address {address}")


def largest_over_ranks(value: float, device: torch.device) -> float:
    """Return the largest value of all ranks. ``device`` is a rank's own: NCCL reduces tensors on GPUs alone."""
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.item()


def _average(model: torch.nn.Module, trained: list[str], recipe: Recipe) -> AverageWeights | None:
    """The average of the trained tensors, if the recipe asks for one."""
    return None if recipe.ema is None else AverageWeights(model, trained, recipe.ema)


class Rank:
    """A learner process. Plain class; `learners.group.RankHost` is its Ray actor."""

    def __init__(self, rank: int, config: LearnerConfig, threads: int, use_gpu: bool, bf16: bool):
        ranks = config.ranks
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "HF_HUB_OFFLINE": "1"}
        self.rank = rank
        self.ranks = ranks
        self.use_gpu = use_gpu
        self.bf16 = bf16
        self.config = config
        torch.set_num_threads(threads)
        self.peak = 1e12 * config.peak_tflops if config.peak_tflops else 0.0

    def join(self, host: str, port: int, own_address: str) -> None:
        """Join the process group at ``host:port``, by the network interface that has ``own_address``."""
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
        # By default gloo listens where the host's name resolves to: on many systems that is the loopback.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface(own_address))
        # gloo suffices on CPUs; DeepSpeed would spend a minute compiling a shared-memory kernel at the first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._init_process_group(host, port)
        deepspeed.init_distributed(verbose=False)  # takes over torch's group

    def _init_process_group(self, host: str, port: int) -> None:
        """As DeepSpeed does, except that the rendezvous listens on ``host`` alone."""
        dist.init_process_group(
            "nccl" if self.use_gpu else "gloo",
            store=rendezvous(host, port, self.rank, self.ranks, default_pg_timeout),
            rank=self.rank,
            world_size=self.ranks,
            timeout=default_pg_timeout,
            device_id=torch.device("cuda", 0) if self.use_gpu and self.ranks > 1 else None,
        )

    def run(self, job: Job) -> dict:
        """Run a job; returns its result, the same kind of dict on every rank."""
        match job:
            case SftJob():
                return self.sft(job)
            case DpoJob():
                return self.dpo(job)
            case PolicyGradientJob():
                return self.policy_gradient(job)
            case RewardJob():
                return self.reward(job)
            case TokenizerJob():
                return train_image_tokenizer(job, self.config, self._dtype, WriteLog(job.output / "log.jsonl").write)

    def _model(self, start: Policy, policy: bool = False) -> Unified:
        """The start of a job, as a ``policy`` for preference and online training, where nothing is random."""
        kind = family_of(load_config(start.model)).model
        device = "cuda" if self.use_gpu else "cpu"
        return load_policy(start, self._dtype, POLICIES[kind] if policy else kind, dropout=not policy, device=device)

    @staticmethod
    def _reference(model: Unified, start: Policy, trained: list[str]) -> StartWeights | None:
        """The start of a job as a reference in this process; None if the workers score it."""
        scores_here = start.adapter is not None and start.adapter.scores_in_learner
        return StartWeights(model, trained) if scores_here else None

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    def _peak(self) -> float:
        """Operations per second of a matrix product in this process: given, or measured before its first job."""
        if not self.peak:
            self.peak = matrix_peak("cuda" if self.use_gpu else "cpu", self._dtype)
        return self.peak

    def _forget_peak_memory(self) -> None:
        forget_peak()
        if self.use_gpu:
            torch.cuda.reset_peak_memory_stats()

    def _peak_memory(self) -> int:
        """Most bytes of the GPU's tensors, or on a CPU of the process, since `_forget_peak_memory`."""
        return torch.cuda.max_memory_allocated() if self.use_gpu else peak_memory()

    def _run(
        self,
        trainer,
        chat: ChatTemplate,
        trained: list[str],
        job: TrainerJob,
        saves: Container[int] = (),
        samples_average: bool = True,
    ) -> dict:
        """Train, and save the result. After the steps ``saves`` weights that sample are saved too: the average, if one
        is kept, or with ``samples_average`` false the trained ones."""
        output = job.output
        average = trainer.average = _average(trainer.model, trained, job.recipe)
        if average is not None:
            trainer.add_callback(average)  # first: the others save it
        trainer.add_callback(SaveAt(trainer, trained, output, saves, average if samples_average else None))
        trainer.add_callback(WriteLog(output / "log.jsonl"))
        trainer.add_callback(FailAt(f"{output.name}/rank-{self.rank}"))
        trainer.clock.peak = self._peak()
        trainer.layout = layout_of(job, self.ranks)
        trainer.keep = self.config.keep_last, self.config.keep_every
        trainer.add_callback(SaveEvery(self.config.save_every, save_request(output)))
        self._forget_peak_memory()
        trainer.train(resume_from_checkpoint=str(job.resume) if job.resume else None)
        seconds = time.time() - trainer.began
        save_trained(trainer, trained, output / "final", average)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        result = {
            "loss_first": losses[0] if losses else None,
            "loss_last": losses[-1] if losses else None,
            "steps": trainer.state.global_step,
            "seconds": seconds,
            "time": trainer.clock.total,
            **trainer.clock.whole(),
            "trained_tensors": len(trained),
            "peak_memory": self._peak_memory(),
        }
        if not isinstance(job, RewardJob):  # a reward model draws nothing
            stored = job.states if isinstance(job, DpoJob | PolicyGradientJob) else None
            with in_force(average):
                result["probe"] = self._score(trainer, chat, job.probe, stored)
        finish(trainer)
        unset_hf_deepspeed_config()
        return result

    @torch.no_grad()
    def _score(self, trainer, chat: ChatTemplate, probe: Probe, stored: Path | None) -> float:
        """Log-probability of the probe under the trained weights, in nats. Every rank must call it (ZeRO-3 gathers).

        ``stored`` is the folder of the language model's states, if they are stored.
        """
        tokenizer, engine = chat.config.image_tokenizer_config, trainer.deepspeed
        engine.eval()
        tokens = token_count(tokenizer.schedule_for(probe.resolution))
        labels = torch.from_numpy(unpack(probe.bits, tokens, *tokenizer.symbols))[None].to(engine.device)
        row = chat.pad([chat.drawn(probe.prompt.text, probe.prompt.reply, tokens).ids], "right", multiple=8)
        row = row.to(engine.device)
        mask = torch.ones_like(row)  # pads after the image cannot influence it: attention is causal
        if isinstance(trainer, ImageDpoTrainer | PolicyGradientTrainer):
            given = {}
            if stored is not None:
                drawn = probe.prompt.text, probe.prompt.reply, probe.bits
                given["states"] = padded_states(stored, [drawn], row.shape[1]).to(engine.device)
            return engine(row, mask, labels, torch.tensor(probe.resolution), **given).log_probs_BK.sum().item()
        drawing = replayed(labels, (probe.resolution,) * 2)
        logits = engine(row, mask, drawing=drawing, text_logits=False).image_logits
        return image_log_probs(symbol_log_probs(logits, labels)).item()

    def _common(self, recipe: Recipe, seed: int, output: Path) -> dict:
        folder = training_checkpoints(output)
        return training_arguments(recipe, self.ranks, seed, folder, self.use_gpu, self.bf16)

    def sft(self, job: SftJob) -> dict:
        """Train a supervised stage. Adds the names of the parts that did not train."""
        torch.manual_seed(job.seed + self.rank)
        model = self._model(job.start)
        stage = STAGES[job.stage].without(job.frozen)
        chat = markup_for(job.start.model, model.config)
        trained = freeze(model, stage, job.start.adapter)
        frozen = frozen_parts(model)
        if job.start.adapter is not None:  # parts as a whole: inside them, all but the matrices is frozen
            frozen = [name for name in frozen if "." not in name]
        # Without cached features the learner encodes images, with a copy: ZeRO-3 may partition the model's own.
        image_tokenizer = None if job.stream.encoded else copy.deepcopy(model.image_tokenizer)
        seed = layout_of(job, self.ranks).seed
        mixture = job.stream.mixture(chat, job.recipe.micro_batch, seed, self.rank, self.ranks)
        trainer = SftTrainer(
            stage,
            loader=job.stream.loader(mixture, seed, self.use_gpu),
            image_tokenizer=image_tokenizer,
            model=model,
            args=TrainingArguments(
                **self._common(job.recipe, job.seed, job.output),
                ignore_data_skip=True,  # the loader has a state of its own
            ),
        )
        return self._run(trainer, chat, trained, job, saves=job.save_steps) | {"frozen": frozen}

    def dpo(self, job: DpoJob) -> dict:
        """Train a preference stage.

        Adds the last margin and accuracy, the largest log-ratio seen at step 0, and seconds spent waiting for pairs.
        """
        torch.manual_seed(job.seed + self.rank)
        model = self._model(job.start, policy=True)
        trained = freeze(model, STAGES["dpo"].without(job.dpo.frozen), job.start.adapter)
        if job.states is not None:
            model.drop_language_model()
        chat = markup_for(job.start.model, model.config)
        arguments = DPOConfig(
            **self._common(job.recipe, job.seed, job.output),
            beta=job.dpo.beta,
            loss_type=list(job.dpo.loss_type),
            loss_weights=job.dpo.loss_weights,
            label_smoothing=job.dpo.label_smoothing,
            precompute_ref_log_probs=True,
            max_length=None,
        )
        pairs = PairTable(job.table, job.parts)
        trainer = ImageDpoTrainer(
            settings=job.dpo,
            pairs=pairs,
            record=job.output / "order.jsonl",
            reference=self._reference(model, job.start, trained),
            model=model,
            args=arguments,
            data_collator=PairCollator(chat, job.dpo.credit_scales, job.states),
            processing_class=chat.tokenizer,
        )
        result = self._run(trainer, chat, trained, job)
        last = next(entry for entry in reversed(trainer.state.log_history) if "rewards/margins" in entry)
        return result | {
            "margin_last": last["rewards/margins"],
            "accuracy_last": last["rewards/accuracies"],
            "step0_max_abs_logratio": largest_over_ranks(trainer.step0_max_abs_logratio, arguments.device),
            "waited": pairs.waited,
        }

    def policy_gradient(self, job: PolicyGradientJob) -> dict:
        """Train on batches of images as they arrive.

        Adds the largest log-ratio seen at a first update, and the seconds spent waiting for batches.
        """
        torch.manual_seed(job.seed + self.rank)
        model = self._model(job.start, policy=True)
        trained = freeze(model, STAGES["dpo"].without(job.rl.frozen), job.start.adapter)
        if job.states is not None:
            model.drop_language_model()
        chat = markup_for(job.start.model, model.config)
        arguments = TrainingArguments(**self._common(job.recipe, job.seed, job.output), ignore_data_skip=True)
        batches = PolicyBatches(
            job.batches,
            steps=job.recipe.steps,
            updates=job.rl.updates,
            batch=job.recipe.batch,
            micro_batch=job.recipe.micro_batch,
            collate=PolicyBatchCollator(chat, job.rl.credit_scales, job.states),
            rank=self.rank,
            ranks=self.ranks,
            device=arguments.device,
        )
        batches.save_request = save_request(job.output)
        trainer = PolicyGradientTrainer(
            job.rl,
            batches,
            ONLINE[job.method],
            reference=self._reference(model, job.start, trained),
            model=model,
            args=arguments,
        )
        last_updates = range(0, job.recipe.steps + 1, job.rl.updates)
        result = self._run(trainer, chat, trained, job, saves=last_updates, samples_average=False)
        worst = largest_over_ranks(trainer.first_update_max_abs_log_ratio, arguments.device)
        return result | {"first_update_max_abs_log_ratio": worst, "waited": batches.waited}

    def reward(self, job: RewardJob) -> dict:
        """Learn a reward from pairs. Adds the share of pairs of the last tenth of the steps that it got right."""
        torch.manual_seed(job.seed + self.rank)
        model = load_reward_model(job.start, self._dtype)
        trained = train_parts(model, job.reward)
        chat = markup_for(job.start.model, model.config)
        arguments = RewardConfig(
            **self._common(job.recipe, job.seed, job.output),
            center_rewards_coefficient=job.reward.center or None,
            max_length=None,
        )
        trainer = ShownImageRewardTrainer(
            model=model,
            args=arguments,
            train_dataset=pairs_dataset(job.pairs),
            data_collator=RewardPairCollator(chat, job.pairs),
            processing_class=chat.tokenizer,
        )
        result = self._run(trainer, chat, trained, job)
        right = [entry["accuracy"] for entry in trainer.state.log_history if "accuracy" in entry]
        last = right[-max(1, len(right) // 10) :]
        return result | {"train_accuracy": sum(last) / len(last)}
