"""A rollout worker: one process with the whole model that samples, encodes, scores, judges and writes images.

Every method takes a batch and returns one result per item, so that the pool can cut, order and repeat batches.
``Worker`` is a plain class; the pool makes it a Ray actor.

A worker is stale, and refuses to serve, until it holds at least the version that was current when it was started.

Shape legend: B batch, T positions, L image tokens, s symbols per token (32 bits, or one index), d latent channels,
h w latent grid, H W pixels (H of states: language-model width), K scales.
"""

import math
import os
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import ray
import torch
from PIL import Image

from actors.transport import WeightTransfer
from actors.weights import WeightLayout, apply, check_fits, checksum_of
from vargpt_rl.common.failpoints import point
from vargpt_rl.common.network import free_port
from vargpt_rl.data.batches import joined, shown_image
from vargpt_rl.data.images import ImageSource
from vargpt_rl.data.samples import Prompt, Sample
from vargpt_rl.data.states import write_states
from vargpt_rl.model.adapter import AdapterConfig, MergedAdapter
from vargpt_rl.model.bits import pack, unpack
from vargpt_rl.model.families import markup_for
from vargpt_rl.model.generate import SamplingConfig, generate_images, to_images
from vargpt_rl.model.graphs import PROMPT_MULTIPLE, DrawingGraphs
from vargpt_rl.model.likelihood import image_log_probs, scale_means, scale_sums, symbol_hits, symbol_log_probs
from vargpt_rl.model.scales import token_count
from vargpt_rl.model.unified import replayed
from vargpt_rl.storage.checkpoint import Policy, load_policy
from vargpt_rl.storage.files import atomic_file
from vargpt_rl.text.engine import TextEngine, TextRequest, answers, replies
from vargpt_rl.text.transformers_engine import TransformersEngine

Rewards = Callable[[list[Image.Image], list[str]], list[float | None]]
"""Images and their prompts -> one number each, None for an image without a score."""

Check = Callable[[list[Image.Image], list[Prompt]], list]
"""Images and their prompts, with all fields -> one verdict each."""

DECODED_IMAGES = 256
"""Decoded images kept, since rewards, checks and grids look at the same ones in turn: 50 MB at 256 px, 200 at 512."""

PromptedBits = tuple[Prompt, bytes]
"""A prompt and the packed image tokens of one of its images."""


@dataclass(frozen=True)
class EncodedImage:
    """An image as packed tokens, ``bits``, and the float16 latent ``features`` [d, h, w] they were quantised from."""

    key: str
    bits: bytes
    features: np.ndarray


@dataclass(frozen=True)
class Failure:
    """An image that could not be loaded, and the reason."""

    key: str
    reason: str


@dataclass(frozen=True)
class ImageScore:
    """Teacher-forced log-probability of an image's tokens, in nats, and the share of symbols predicted right."""

    total: float
    by_scale: list[float]
    hits_by_scale: list[float]


Parameters = ParamSpec("Parameters")
Server = TypeVar("Server", bound="BaseWorker")
Result = TypeVar("Result")


def serving(
    method: Callable[Concatenate[Server, Parameters], Result],
) -> Callable[Concatenate[Server, Parameters], Result]:
    """Decorate a method that needs the current weights: raise RuntimeError if stale, run without gradients."""

    @wraps(method)
    def call(self: Server, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if self.version < self.version_required:
            raise RuntimeError(f"stale worker: holds version {self.version}, needs {self.version_required}")
        point(f"worker/{method.__name__}")
        with torch.inference_mode():
            return method(self, *args, **kwargs)

    return call


class BaseWorker(ABC):
    """The part common to all workers: versioned weights, and text.

    The initial checkpoint is version 0. A worker serves once it holds ``version_required``.
    """

    def __init__(self, engine: TextEngine, source: ImageSource, device: str, version_required: int):
        self.engine = engine
        self.source = source
        self.device = device
        self.version = 0
        self.checksum = ""
        self.version_required = version_required

    @abstractmethod
    def check_layout(self, layout: WeightLayout) -> None:
        """Raise KeyError or ValueError for a weight set that does not fit."""

    @abstractmethod
    def load_weights(self, version: int, transfer: WeightTransfer) -> str:
        """Load a weight set that fits; return the checksum of what was loaded."""

    def status(self) -> dict[str, int | str]:
        """Version and checksum of the last weight set, and the worker's process, device and node."""
        return {
            "version": self.version,
            "checksum": self.checksum,
            "pid": os.getpid(),
            "device": self.device,
            "node": platform.node(),
        }

    def address(self) -> tuple[str, int]:
        """This node's address in the cluster and a free port: the rendezvous of a broadcast."""
        return ray.util.get_node_ip_address(), free_port()

    def receive(self, version: int, expected_checksum: str, transfer: WeightTransfer) -> dict[str, int | str | float]:
        """Load a weight set and verify it.

        ValueError for a version older than the worker's own. KeyError or ValueError for a set that does not fit, which
        changes nothing. RuntimeError if the loaded weights do not have the expected checksum; then, or if the transfer
        breaks off, the worker is stale until the next good set.
        """
        if version < self.version:
            raise ValueError(f"version {version} is older than the worker's own, {self.version}")
        start = time.perf_counter()
        self.check_layout(transfer.layout)
        self.version = -1
        found = self.load_weights(version, transfer)
        if found != expected_checksum:
            raise RuntimeError(
                f"weights {version} have checksum {found}, expected {expected_checksum}: file or transfer is corrupt"
            )
        self.version, self.checksum = version, found
        seconds = time.perf_counter() - start
        return {"version": version, "checksum": found, "bytes": transfer.layout.bytes, "seconds": seconds}

    @serving
    def answer(self, questions: list[tuple[str, str]], side: int, max_new_tokens: int = 8) -> list[str]:
        """Answer each (image key, question) greedily; images are loaded as ``side`` x ``side`` pixels."""
        requests = [TextRequest(text, [self.source.load(key, side)]) for key, text in questions]
        return answers(self.engine, requests, max_new_tokens)

    @serving
    def reply(self, texts: list[str], max_new_tokens: int) -> list[str | None]:
        """The model's words before the image for each drawing request; None if it begins no image."""
        return replies(self.engine, texts, max_new_tokens)


class Worker(BaseWorker):
    """The model of ``checkpoint`` (a directory), in fp32 or bf16, whatever the dtype of its files.

    With an ``adapter``, weight sets hold its tensors; until the first, it has no effect.
    """

    def __init__(
        self,
        checkpoint: str,
        source: ImageSource,
        threads: int,
        use_gpu: bool = False,
        bf16: bool = False,
        cuda_graphs: bool = False,
        version_required: int = 0,
        adapter: AdapterConfig | None = None,
    ):
        torch.set_num_threads(threads)
        dtype = torch.bfloat16 if bf16 else torch.float32
        device = "cuda" if use_gpu else "cpu"
        model = load_policy(Policy(checkpoint, adapter=adapter), dtype, device=device)
        self.model = model.to(device).eval()
        self._draw_scales = DrawingGraphs() if cuda_graphs else None
        self._prompt_multiple = PROMPT_MULTIPLE if use_gpu else 1
        self._merged = MergedAdapter(self.model) if adapter is not None and adapter.is_merged else None
        self.chat = markup_for(checkpoint, self.model.config)
        self.image_tokenizer = self.model.image_tokenizer
        self.symbols = self.model.config.image_tokenizer_config.symbols
        self._decoded = lru_cache(DECODED_IMAGES)(self._decode)
        engine = TransformersEngine(self.model, self.chat)
        super().__init__(engine, source, str(self.model.device), version_required)

    def check_layout(self, layout: WeightLayout) -> None:
        check_fits(self.model, layout)

    def load_weights(self, version: int, transfer: WeightTransfer) -> str:
        """Copy into the model's own tensors and return their checksum; merge an adapter if it is to be."""
        own = self.model.state_dict()
        self._decoded.cache_clear()
        for chunk in transfer.chunks():
            apply(own, chunk)
            point("worker/swap")
        if self._merged is not None:
            self._merged.refresh()
        return checksum_of(own, transfer.layout.dtypes)

    @serving
    def generate_images(
        self, jobs: list[tuple[Prompt, int]], resolution: int, sampling: SamplingConfig, checkpoint: str
    ) -> list[Sample]:
        """Sample an image of ``resolution`` x ``resolution`` pixels for each (prompt, seed); prompts may show images.

        ``checkpoint`` is a name for the current weights, kept in the samples.
        """
        return self._generate(jobs, resolution, sampling, checkpoint)

    @serving
    def complete_images(
        self, jobs: list[tuple[Sample, int]], scales: int, resolution: int, sampling: SamplingConfig, checkpoint: str
    ) -> list[Sample]:
        """Sample for each (image, seed) another image that shares its first ``scales`` scales, and its prompt."""
        schedule = self.image_tokenizer.schedule_for(resolution)
        labels_BLs = self._labels([(image.prompt, image.bits) for image, _ in jobs], token_count(schedule))
        prompts = [(image.prompt, seed) for image, seed in jobs]
        given_BLs = labels_BLs[:, : token_count(schedule[:scales])]
        return self._generate(prompts, resolution, sampling, checkpoint, given_BLs)

    def _generate(
        self,
        jobs: list[tuple[Prompt, int]],
        resolution: int,
        sampling: SamplingConfig,
        checkpoint: str,
        given_BLs: torch.Tensor | None = None,
    ) -> list[Sample]:
        grids, seen = self._shown([prompt for prompt, _ in jobs])
        rows = [self.chat.drawing_prompt(p.text, p.reply, grid) for (p, _), grid in zip(jobs, grids, strict=True)]
        ids_BT, mask_BT = self._rows(rows, "left", self._prompt_multiple)
        drawn = generate_images(
            self.model,
            ids_BT,
            mask_BT,
            [seed for _, seed in jobs],
            (resolution, resolution),
            sampling,
            **seen,
            given_BLs=given_BLs,
            draw=self._draw_scales,
        )
        settings = asdict(sampling)
        return [
            Sample(prompt, bits, resolution, seed, settings, self.version, checkpoint, log_probs)
            for (prompt, seed), bits, log_probs in zip(
                jobs, self._packed(drawn.labels_BLs), drawn.log_probs_BK.tolist(), strict=True
            )
        ]

    @serving
    def encode(self, keys: list[str], resolution: int) -> list[EncodedImage | Failure]:
        """Encode images of the source; one that cannot be loaded becomes a ``Failure``."""
        results: dict[int, EncodedImage | Failure] = {}
        images: dict[int, np.ndarray] = {}
        for i, key in enumerate(keys):
            image = self._load(key, resolution)
            if isinstance(image, Failure):
                results[i] = image
            else:
                images[i] = np.asarray(image, np.float32)
        if images:
            images_BHW3 = torch.from_numpy(np.stack(list(images.values()))).to(self.model.device)
            images_B3HW = (images_BHW3 / 127.5 - 1).permute(0, 3, 1, 2).to(self.model.dtype)
            features_Bdhw = self.image_tokenizer.features(images_B3HW)
            schedule = self.image_tokenizer.schedule_for(resolution)
            packed = self._packed(self.image_tokenizer.quantise(features_Bdhw, schedule).labels_BLs)
            for i, bits, features_dhw in zip(images, packed, features_Bdhw.half().cpu().numpy(), strict=True):
                # A copy: a view would keep the whole batch's array alive.
                results[i] = EncodedImage(keys[i], bits, features_dhw.copy())
        return [results[i] for i in range(len(keys))]

    def find_unreadable(self, keys: list[str], side: int) -> list[Failure | None]:
        """Try to load images of the source: a ``Failure`` for each that cannot be loaded, else None."""
        return [None if isinstance(image := self._load(key, side), Image.Image) else image for key in keys]

    @serving
    def score(
        self, items: list[PromptedBits], resolution: int, tau: float = 1.0, states: Path | None = None
    ) -> list[ImageScore]:
        """Log-probability of each image's own tokens given its prompt, teacher-forced, never unconditional.

        It is that of the logits divided by the temperature ``tau``. ``states`` is a folder to store the language
        model's states in (`vargpt_rl.data.states`).
        """
        schedule = self.image_tokenizer.schedule_for(resolution)
        tokens = token_count(schedule)
        grids, seen = self._shown([prompt for prompt, _ in items])
        rows = [self.chat.drawn(p.text, p.reply, tokens, grid).ids for (p, _), grid in zip(items, grids, strict=True)]
        ids_BT, mask_BT = self._rows(rows, "right", multiple=8)
        labels_BLs = self._labels(items, tokens)
        drawing = replayed(labels_BLs, (resolution, resolution))
        output = self.model(ids_BT, mask_BT, drawing, text_logits=False, **seen)
        logits = output.image_logits
        if states is not None:
            self._store(states, items, ids_BT, output.states)
        log_probs_BLs = symbol_log_probs(logits if tau == 1 else logits / tau, labels_BLs)
        return [
            ImageScore(*score)
            for score in zip(
                image_log_probs(log_probs_BLs).tolist(),
                scale_sums(log_probs_BLs, schedule).tolist(),
                scale_means(symbol_hits(logits, labels_BLs).float(), schedule).tolist(),
                strict=True,
            )
        ]

    def _store(self, folder: Path, items: list[PromptedBits], ids_BT: torch.Tensor, states_BTH: torch.Tensor) -> None:
        """Write the states of each row up to its image's last token."""
        drawn_BT = ids_BT == self.model.config.image_gen_pad_token_id
        ends = (drawn_BT * torch.arange(1, ids_BT.shape[1] + 1, device=ids_BT.device)).amax(1).tolist()
        for (prompt, bits), end, states_TH in zip(items, ends, states_BTH, strict=True):
            write_states(folder, (prompt.text, prompt.reply, bits), states_TH[:end])

    @serving
    def reward(self, items: list[PromptedBits], resolution: int, rewards: Rewards) -> list[float | None]:
        """The reward of each image; one that is not finite counts as None.

        ValueError unless there is one value per image.
        """
        values = rewards(self._images(items, resolution), [prompt.text for prompt, _ in items])
        if len(values) != len(items):
            raise ValueError(f"the reward returned {len(values)} values for {len(items)} images")
        values = [value if value is None or isinstance(value, float) else float(value) for value in values]
        return [None if value is None or not math.isfinite(value) else value for value in values]

    @serving
    def check(self, items: list[PromptedBits], resolution: int, check: Check) -> list:
        """The verdict of ``check`` on each image."""
        return check(self._images(items, resolution), [prompt for prompt, _ in items])

    @serving
    def write_images(self, items: list[tuple[PromptedBits, str]], resolution: int, folder: str) -> list[Path]:
        """Write each image as a PNG, ``folder/name``, atomically; return the paths."""
        paths = []
        for image, (_, name) in zip(self._images([drawn for drawn, _ in items], resolution), items, strict=True):
            path = Path(folder, name)
            with atomic_file(path) as unfinished:
                image.save(unfinished, "PNG")
            paths.append(path)
        return paths

    def _load(self, key: str, side: int) -> Image.Image | Failure:
        try:
            return self.source.load(key, side)
        except (ValueError, OSError) as error:
            return Failure(key, f"{type(error).__name__}: {error}")

    def _shown(self, prompts: list[Prompt]) -> tuple[list[torch.Tensor | None], dict[str, torch.Tensor]]:
        """The grid of each prompt's image (None if it shows none), and all images on the model's device."""
        images = [shown_image(prompt, self.source, self.chat) for prompt in prompts]
        seen = {name: tensor.to(self.model.device) for name, tensor in joined(images).items()}
        return [image and image.image_grid_thw for image in images], seen

    def _rows(self, rows: list[list[int]], side: str, multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Padded int64 ids and attention mask [B, T] on the model's device."""
        ids_BT = self.chat.pad(rows, side, multiple=multiple)
        mask_BT = self.chat.pad([[1] * len(row) for row in rows], side, value=0, multiple=multiple)
        return ids_BT.to(self.model.device), mask_BT.to(self.model.device)

    def _packed(self, labels_BLs: torch.Tensor) -> list[bytes]:
        """The packed image tokens of each image."""
        return [pack(labels_Ls, self.symbols.values) for labels_Ls in labels_BLs.cpu().numpy()]

    def _labels(self, items: list[PromptedBits], tokens: int) -> torch.Tensor:
        """Unpacked symbols [B, L, s], uint8 or int32, on the model's device."""
        labels_BLs = np.stack([unpack(packed, tokens, *self.symbols) for _, packed in items])
        return torch.from_numpy(labels_BLs).to(self.model.device)

    def _images(self, items: list[PromptedBits], resolution: int) -> list[Image.Image]:
        """Decode image tokens to images, or return those decoded before with the same weights."""
        return [self._decoded(bits, resolution) for _, bits in items]

    def _decode(self, bits: bytes, resolution: int) -> Image.Image:
        schedule = self.image_tokenizer.schedule_for(resolution)
        labels_Ls = unpack(bits, token_count(schedule), *self.symbols)
        labels_1Ls = torch.from_numpy(labels_Ls[None]).to(self.model.device)
        summed_1dhw = self.image_tokenizer.replay(labels_1Ls, schedule, self.model.dtype).summed_Bdhw
        return to_images(self.model, summed_1dhw)[0]


REPEATABLE = {
    Worker.generate_images,
    Worker.complete_images,
    Worker.encode,
    Worker.score,
    Worker.answer,
    Worker.reply,
    Worker.find_unreadable,
}
"""Methods that two workers may run on the same batch at once: they have no side effects."""
