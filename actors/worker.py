"""One rollout worker: a whole model in one process, that draws, encodes, scores, judges, writes and answers.

Every method takes a batch and returns one result an item, so that the pool can cut, order and repeat batches as it
likes. ``Worker`` is a plain class; ``RolloutWorker`` is the same as a Ray actor.

A worker is stale, and refuses to serve, until it holds at least the version that was current when it was made.

Shape legend: B batch, T positions, L image tokens, d bits a token, h w latent grid, H W pixels.
"""

import math
import os
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import Protocol

import numpy as np
import ray
import torch
from PIL import Image

from actors.weights import Weights, apply, checksum_of, dtypes_of, size_of
from vargpt_rl.data.types import Prompt, Sample
from vargpt_rl.model.bits import pack, quantise, replay, unpack
from vargpt_rl.model.generate import SamplingConfig, draw, to_uint8
from vargpt_rl.model.likelihood import bit_hits, bit_log_probs, picture_log_probs, scale_means, scale_sums
from vargpt_rl.model.modeling import Drawing, Vargpt
from vargpt_rl.model.prompt import ChatFormat
from vargpt_rl.model.scales import schedule_for, token_count
from vargpt_rl.text.requests import Request, TextEngine, answers, replies
from vargpt_rl.text.transformers_engine import TransformersEngine

Rewards = Callable[[list[Image.Image], list[str]], list[float | None]]
"""Pictures and their prompts -> a number each, None where there is none."""

Drawn = tuple[Prompt, bytes]
"""A prompt and the packed bits of a picture of it."""


class PictureSource(Protocol):
    """Where pictures come from: ``load`` gives the RGB picture of a key, ``side`` x ``side`` pixels."""

    def load(self, key: str, side: int) -> Image.Image: ...


@dataclass(frozen=True)
class Encoded:
    """A picture as packed ``bits`` and as the float16 latent ``features`` [d, h, w] they were read off."""

    key: str
    bits: bytes
    features: np.ndarray


@dataclass(frozen=True)
class Failure:
    """A picture that could not be loaded, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class Score:
    """Teacher-forced log-probability of a picture's bits, in nats, and the share of bits guessed right."""

    total: float
    by_scale: list[float]
    hits_by_scale: list[float]


def serving(method):
    """A method that needs the current weights: refuses when stale, and runs without gradients."""

    @wraps(method)
    def call(self, *args):
        if self.version < self.version_required:
            raise RuntimeError(f"stale worker: holds version {self.version}, needs {self.version_required}")
        with torch.inference_mode():
            return method(self, *args)

    return call


class Writer(ABC):
    """What all workers share: published weights and how they are taken, and text.

    The checkpoint it starts from is version 0; it serves once it holds ``version_required``.
    """

    def __init__(self, engine: TextEngine, source: PictureSource, device: str, version_required: int):
        self.engine, self.source, self.device = engine, source, device
        self.version, self.checksum = 0, ""
        self.version_required = version_required

    @abstractmethod
    def take(self, version: int, tensors: Weights) -> str:
        """Put a weight set in place; the checksum of what was taken."""

    def status(self) -> dict[str, int | str]:
        """Version and checksum of the last weight set received, and where the worker runs."""
        return {
            "version": self.version,
            "checksum": self.checksum,
            "pid": os.getpid(),
            "device": self.device,
            "node": platform.node(),
        }

    def receive(self, version: int, expected_checksum: str, tensors: Weights) -> dict[str, int | str | float]:
        """Put a weight set in place and verify it.

        ValueError for a version older than the worker's own. RuntimeError when what it holds does not have the
        expected checksum: it is of no known version then, and the worker is stale until the next good set.
        """
        if version < self.version:
            raise ValueError(f"version {version} is older than the worker's own, {self.version}")
        start = time.perf_counter()
        found = self.take(version, tensors)
        if found != expected_checksum:
            self.version = -1
            raise RuntimeError(f"version {version} arrived with checksum {found}, published was {expected_checksum}")
        self.version, self.checksum = version, found
        seconds = time.perf_counter() - start
        return {"version": version, "checksum": found, "bytes": size_of(tensors), "seconds": seconds}

    @serving
    def answer(self, questions: list[tuple[str, str]], side: int, max_new_tokens: int) -> list[str]:
        """Greedy answer in words to each (picture key, question); pictures are loaded at ``side`` pixels a side."""
        requests = [Request(text, self.source.load(key, side)) for key, text in questions]
        return answers(self.engine, requests, max_new_tokens)

    @serving
    def reply(self, texts: list[str], max_new_tokens: int) -> list[str | None]:
        """What the model says to each drawing request before it begins a picture; None where it begins none."""
        return replies(self.engine, texts, max_new_tokens)


class Worker(Writer):
    """The model of ``checkpoint`` (a directory), in fp32 or bf16, whatever its files hold."""

    def __init__(
        self,
        checkpoint: str,
        source: PictureSource,
        threads: int,
        use_gpu: bool = False,
        bf16: bool = False,
        version_required: int = 0,
    ):
        torch.set_num_threads(threads)
        dtype = torch.bfloat16 if bf16 else torch.float32
        self.model = Vargpt.from_pretrained(checkpoint, dtype=dtype).to("cuda" if use_gpu else "cpu").eval()
        self.chat = ChatFormat(checkpoint, self.model.config)
        engine = TransformersEngine(self.model, self.chat)
        super().__init__(engine, source, str(self.model.device), version_required)

    def take(self, version: int, tensors: Weights) -> str:
        """Copy into the model's own tensors, and hash these."""
        apply(self.model, tensors)
        return checksum_of(self.model, dtypes_of(tensors))

    @serving
    def draw(
        self, jobs: list[tuple[Prompt, int]], resolution: int, sampling: SamplingConfig, checkpoint: str
    ) -> list[Sample]:
        """Draw a square picture of ``resolution`` pixels a side for each (prompt, seed)."""
        ids_BT, mask_BT = self._rows([self.chat.drawing_prompt(p.text, p.reply) for p, _ in jobs], "left")
        seeds = [seed for _, seed in jobs]
        bits_BLd = draw(self.model, ids_BT, mask_BT, seeds, (resolution, resolution), sampling).bits_BLd
        return [
            Sample(prompt, pack(bits_Ld), resolution, seed, asdict(sampling), self.version, checkpoint)
            for (prompt, seed), bits_Ld in zip(jobs, bits_BLd.cpu().numpy(), strict=True)
        ]

    @serving
    def encode(self, keys: list[str], resolution: int) -> list[Encoded | Failure]:
        """Pictures of the source as bits and features; one that cannot be loaded is a ``Failure``."""
        results: dict[int, Encoded | Failure] = {}
        images: dict[int, np.ndarray] = {}
        for i, key in enumerate(keys):
            try:
                images[i] = np.asarray(self.source.load(key, resolution), np.float32)
            except (ValueError, OSError) as error:
                results[i] = Failure(key, f"{type(error).__name__}: {error}")
        if images:
            images_BHW3 = torch.from_numpy(np.stack(list(images.values()))).to(self.model.device)
            images_B3HW = (images_BHW3 / 127.5 - 1).permute(0, 3, 1, 2).to(self.model.dtype)
            features_Bdhw = self.model.image_tokenizer.features(images_B3HW)
            bits_BLd = quantise(features_Bdhw, schedule_for(resolution)).bits_BLd.cpu().numpy()
            for i, bits_Ld, features_dhw in zip(images, bits_BLd, features_Bdhw.half().cpu().numpy(), strict=True):
                # A copy, or each result would drag the whole batch's array along.
                results[i] = Encoded(keys[i], pack(bits_Ld), features_dhw.copy())
        return [results[i] for i in range(len(keys))]

    @serving
    def score(self, items: list[Drawn], resolution: int) -> list[Score]:
        """Log-probability of each picture's very bits given its prompt, teacher forced, no condition dropped."""
        schedule = schedule_for(resolution)
        tokens = token_count(schedule)
        rows = [self.chat.drawn(prompt.text, prompt.reply, tokens).ids for prompt, _ in items]
        ids_BT, mask_BT = self._rows(rows, "right", multiple=8)
        bits_BLd = self._bits(items, tokens)
        inputs_BLd = replay(bits_BLd, schedule, self.model.dtype).inputs_BLd
        logits = self.model(
            ids_BT, mask_BT, Drawing(inputs_BLd, (resolution, resolution)), text_logits=False
        ).image_logits
        log_probs_BLd = bit_log_probs(logits, bits_BLd)
        return [
            Score(*score)
            for score in zip(
                picture_log_probs(log_probs_BLd).tolist(),
                scale_sums(log_probs_BLd, schedule).tolist(),
                scale_means(bit_hits(logits, bits_BLd).float(), schedule).tolist(),
                strict=True,
            )
        ]

    @serving
    def reward(self, items: list[Drawn], resolution: int, rewards: Rewards) -> list[float | None]:
        """What ``rewards`` says of each picture; NaN counts as None. ValueError unless it says one thing a picture."""
        values = rewards(self._decode(items, resolution), [prompt.text for prompt, _ in items])
        if len(values) != len(items):
            raise ValueError(f"the reward returned {len(values)} values for {len(items)} pictures")
        values = [value if value is None or isinstance(value, float) else float(value) for value in values]
        return [None if value is None or math.isnan(value) else value for value in values]

    @serving
    def pictures(self, items: list[tuple[Drawn, str]], resolution: int, folder: str) -> list[Path]:
        """Write each picture as ``folder/name``, a PNG; returns the paths. A file is there whole or not at all."""
        paths = []
        for image, (_, name) in zip(self._decode([drawn for drawn, _ in items], resolution), items, strict=True):
            path = Path(folder, name)
            unfinished = path.with_name(f".{path.name}.{os.getpid()}")
            image.save(unfinished, "PNG")
            os.replace(unfinished, path)
            paths.append(path)
        return paths

    def _rows(self, rows: list[list[int]], side: str, multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 ids and attention mask [B, T] on the model's device."""
        ids_BT = self.chat.pad(rows, side, multiple=multiple)
        mask_BT = self.chat.pad([[1] * len(row) for row in rows], side, value=0, multiple=multiple)
        return ids_BT.to(self.model.device), mask_BT.to(self.model.device)

    def _bits(self, items: list[Drawn], tokens: int) -> torch.Tensor:
        """uint8 [B, L, d] on the model's device."""
        depth = self.model.config.image_tokenizer_config.bits
        bits_BLd = np.stack([unpack(packed, tokens, depth) for _, packed in items])
        return torch.from_numpy(bits_BLd).to(self.model.device)

    def _decode(self, items: list[Drawn], resolution: int) -> list[Image.Image]:
        """The pictures that the bits stand for."""
        schedule = schedule_for(resolution)
        summed_Bdhw = replay(self._bits(items, token_count(schedule)), schedule, self.model.dtype).summed_Bdhw
        images_BHW3 = to_uint8(self.model.image_tokenizer.decode(summed_Bdhw)).cpu().numpy()
        return [Image.fromarray(image) for image in images_BHW3]


RolloutWorker = ray.remote(Worker)
