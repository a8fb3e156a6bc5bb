"""Supervised training of any stage: a ``transformers.Trainer`` whose loss is ``vargpt_rl.losses.supervised.sft_loss``.

Each micro-batch holds the stage's share of drawings and of questions, whatever the number of each ("dynamic batch
balancing between modalities", VARGPT-v1.1, section 4.1), so that every rank has gradients for the same parameters.
"""

import json
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch.utils.data import Dataset, SequentialSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from learners.gradient_norms import EVERY, ModalityGradients
from learners.resume import Resumable
from vargpt_rl.data.batches import DrawExample, Example, ImageSource, TextExample, shown_image
from vargpt_rl.data.samples import ImageQuestion, Prompt
from vargpt_rl.losses.supervised import modality_losses, sft_loss
from vargpt_rl.model.families import AnyImageTokenizer
from vargpt_rl.model.prompt import ChatTemplate
from vargpt_rl.model.unified import Unified
from vargpt_rl.stages import Stage


class Drawings(Dataset):
    """The encoded images of a corpus folder: ``features.safetensors`` and ``prompts.jsonl``, in the same order.

    Images that prompts show are loaded by ``source``.
    """

    def __init__(self, folder: Path, source: ImageSource | None = None, chat: ChatTemplate | None = None):
        self.source, self.chat = source, chat
        lines = (folder / "prompts.jsonl").read_text().splitlines()
        self.prompts = [Prompt(**json.loads(line)) for line in lines]
        self.file = safe_open(folder / "features.safetensors", framework="np").get_slice("features")
        if self.file.get_shape()[0] != len(self.prompts):
            raise ValueError(f"{folder}: {self.file.get_shape()[0]} images for {len(self.prompts)} prompts")

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> DrawExample:
        prompt = self.prompts[index]
        return DrawExample(prompt, self.file[index : index + 1][0], shown_image(prompt, self.source, self.chat))


class Questions(Dataset):
    """Questions about images that a data source can load: ``rows``."""

    def __init__(self, rows: list[ImageQuestion], source: ImageSource, chat: ChatTemplate, side: int):
        self.rows, self.source, self.chat, self.side = rows, source, chat, side

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TextExample:
        key, question, answer = self.rows[index]
        return TextExample(question, answer, self.chat.vision_inputs([self.source.load(key, self.side)]))


class BalancedBatches(Dataset):
    """A fixed order over two sources: each block of ``micro_batch`` items holds the same share of drawings."""

    def __init__(
        self, drawings: Dataset, questions: Dataset | None, length: int, micro_batch: int, share: float, seed: int
    ):
        rng = np.random.default_rng(seed)
        per_block = micro_batch if questions is None else round(share * micro_batch)
        if questions is not None and 0 < share < 1 and per_block in (0, micro_batch):
            raise ValueError(f"a share of {share} drawings gives {per_block} of each micro_batch={micro_batch}")
        self.sources, self.order = (drawings, questions), []
        streams = [_endless(rng, len(source)) if source is not None else None for source in self.sources]
        for i in range(length):
            which = 0 if i % micro_batch < per_block else 1
            self.order.append((which, next(streams[which])))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Example:
        which, item = self.order[index]
        return self.sources[which][item]


def _endless(rng: np.random.Generator, count: int):
    """Every index once in random order, over and over."""
    while True:
        yield from rng.permutation(count).tolist()


class SftTrainer(Resumable, Trainer):
    """Stage losses; every metric is the mean since the last log, over ranks, and ``tokens/...`` the sum.

    Where there are two losses, their gradient norms are logged now and then; where there is one, ``grad_norm`` is its.

    Batches are those of ``loader``, a rank's own, where there is one, else of ``train_dataset``, shared over ranks.
    ``image_tokenizer``, apart from the model that trains, takes the features of images that come as pixels.
    """

    def __init__(
        self,
        stage: Stage,
        loader: StatefulDataLoader | None = None,
        image_tokenizer: AnyImageTokenizer | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.stage, self.loader = stage, loader
        self.image_tokenizer = image_tokenizer and image_tokenizer.eval().to(self.args.device)
        self.measured: dict[str, list[float]] = defaultdict(list)
        self.gradients: ModalityGradients | None = None
        self.waited, self.since = 0.0, None

    def get_batch_samples(self, *args):
        """The batches of a step; ``data_wait`` is the share of a step's time that goes by until they are there."""
        began = time.perf_counter()
        self.since = self.since or began
        samples = super().get_batch_samples(*args)
        self.waited += time.perf_counter() - began
        return samples

    def get_train_dataloader(self):
        return super().get_train_dataloader() if self.loader is None else self.loader

    def _get_train_sampler(self, *args) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # the order is the data set's

    @torch.no_grad()
    def _features(self, crops_NHW3: torch.Tensor) -> torch.Tensor:
        """uint8 [N, H, W, 3] -> float16 [N, d, h, w], as rollout workers encode images."""
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
        """The micro-batch's gradient of each loss, under the noise that it is about to be trained with."""
        if self.gradients is None:
            self.gradients = ModalityGradients(model, self.args.gradient_accumulation_steps)
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            losses, _ = modality_losses(model, inputs, self.stage.noise, self.stage.text_weight)
        self.gradients.add(losses)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.measured:
            now = time.perf_counter()
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
