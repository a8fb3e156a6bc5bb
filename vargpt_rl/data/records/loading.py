"""What supervised stages learn from records: micro-batches, streamed in each learner rank.

Worker processes read conversations, decode and encode their images ahead of the training step, and never hold more
than a block of records and a few batches. Every micro-batch has the same share of drawings ("dynamic batch balancing
between modalities", VARGPT-v1.1, section 4.1). Images to draw are random crops; the learner takes their features,
unless these were encoded beforehand. All that is random follows from the seed and from a batch's place, so that a
stream that is resumed gives the very batches that it would have given.

Shape legend: H W image, d bits a token, h w latent grid.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchdata.stateful_dataloader import StatefulDataLoader

from vargpt_rl.data.batches import Row, SftCollator
from vargpt_rl.data.images import random_crop
from vargpt_rl.data.mixture import Mixture, MixtureSource
from vargpt_rl.data.quarantine import BadRecord
from vargpt_rl.data.records.images import ImageRef, content_sha256, load
from vargpt_rl.data.records.schema import DRAWN, SHOWN, RecordConversation, pieces, placeholders
from vargpt_rl.data.records.sources import RecordSource, open_records
from vargpt_rl.data.records.stream import ReadOptions
from vargpt_rl.data.sources import is_held_out
from vargpt_rl.model.prompt import ChatTemplate, EncodedText, ImageToDraw, Part, VisionInputs
from vargpt_rl.model.scales import token_count

PEEK = 16
"""Rows that are read to see which task a source is of."""
EDITS = ("editing",)
"""What the editing stage learns from."""
AHEAD = 4
"""Batches that each worker prepares ahead."""


class Cached(NamedTuple):
    """An image whose features were encoded beforehand: its file's sha256 and the numbers of its crops."""

    content: str
    crops: tuple[int, ...]


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation but for the crops of its images to draw, which are a batch's own."""

    text: EncodedText
    vision: VisionInputs | None
    drawn: tuple[Image.Image | Cached, ...]


@dataclass(frozen=True)
class Admit:
    """A step of `Records`: conversations of a source for ``task``; drawings that are held out are left out.

    Plain drawings may be among edits, but nothing else may be mixed: where all batches draw and none shows an image,
    the vision tower need not run.
    """

    task: str
    held_out_fraction: float

    def __call__(self, record: RecordConversation) -> RecordConversation | None:
        if record.task != self.task and (self.task, record.task) != ("editing", "generation"):
            raise BadRecord(f"{record.task} record in a source of {self.task}")
        if modality(self.task) == "generation" and is_held_out(record.id, self.held_out_fraction):
            return None
        return record


@dataclass(frozen=True)
class Encode:
    """A step of `Records`: conversations as they are trained on, at one ``resolution``.

    Raises BadRecord for an image that cannot be used or is not in ``cache``, and for rows above ``max_tokens``.
    """

    chat: ChatTemplate
    resolution: int
    max_tokens: int
    seen_pixels: int
    cache: object | None = None

    def __call__(self, record: RecordConversation) -> EncodedConversation:
        marks = [mark for message in record.messages for mark in placeholders(message.text)]
        found = list(zip(marks, record.images, strict=True))
        vision = self._shown([load(image) for mark, image in found if mark == SHOWN])
        text = self.chat.encode(self._turns(record, vision))
        if len(text.ids) > self.max_tokens:
            raise BadRecord(f"row of more than {self.max_tokens} tokens")
        return EncodedConversation(text, vision, tuple(self._drawn(image) for mark, image in found if mark == DRAWN))

    def _shown(self, images: list[Image.Image]) -> VisionInputs | None:
        if not images:
            return None
        try:
            return self.chat.vision_inputs(images, self.seen_pixels)
        except ValueError as error:
            raise BadRecord(f"image cannot be shown: {str(error).partition(',')[0]}") from error

    def _turns(self, record: RecordConversation, vision: VisionInputs | None) -> Iterator[tuple[str, list[Part]]]:
        shown = iter(self.chat.shown(vision.image_grid_thw if vision else None))
        drawn = ImageToDraw(token_count(self.chat.config.image_tokenizer_config.schedule_for(self.resolution)))
        for message in record.messages:
            parts = pieces(message.text)
            yield message.role, [next(shown) if part == SHOWN else drawn if part == DRAWN else part for part in parts]

    def _drawn(self, image: ImageRef) -> Image.Image | Cached:
        if self.cache is None:
            return load(image)
        content = content_sha256(image)
        crops = tuple(n for n in range(self.cache.crops) if self.cache.get(content, n) is not None)
        if not crops:
            raise BadRecord("image was not encoded beforehand")
        return Cached(content, crops)


@dataclass(frozen=True)
class MakeBatch:
    """Samples and a generator -> a batch of `SftCollator`, with a random crop of each image to draw."""

    collate: SftCollator
    resolution: int
    cache: object | None = None

    def __call__(self, samples: list[EncodedConversation], rng: np.random.Generator) -> dict[str, torch.Tensor]:
        rows = [Row(s.text, s.vision, tuple(self._crop(image, rng) for image in s.drawn)) for s in samples]
        return self.collate(rows)

    def _crop(self, image: Image.Image | Cached, rng: np.random.Generator) -> np.ndarray:
        """uint8 [H, W, 3], or float16 [d, h, w] from the cache."""
        if isinstance(image, Cached):
            return self.cache.get(image.content, int(rng.choice(image.crops)))
        return np.asarray(random_crop(image, self.resolution, rng))


@dataclass(frozen=True)
class RecordStream:
    """A run's sources of records and how they are read; `at` says for which stage.

    ``tasks``: what each source is for, see `task_of`. ``encoded``: a folder with a cache of features for each
    resolution, made with the image tokenizer of this checksum. Bad records are written to the folder ``quarantine``.
    """

    sources: dict[str, RecordSource]
    tasks: dict[str, str]
    quarantine: Path
    held_out_fraction: float
    max_bad_fraction: float
    block: int
    max_tokens: int
    seen_pixels: int
    packs: bool
    workers: int
    encoded: Path | None = None
    tokenizer_checksum: str = ""
    resolution: int = 0
    drawing_share: float = 1.0
    wanted: tuple[str, ...] = ("generation", "understanding")

    def at(self, resolution: int, drawing_share: float = 1.0, wanted: tuple[str, ...] | None = None) -> "RecordStream":
        """For a stage that learns from tasks that are ``wanted``."""
        return replace(self, resolution=resolution, drawing_share=drawing_share, wanted=wanted or self.wanted)

    def cache(self):
        """The features that were encoded beforehand, or None. ValueError for those of another image tokenizer."""
        if self.encoded is None:
            return None
        from vargpt_rl.data.features import FeatureCache

        return FeatureCache(self.encoded / str(self.resolution), self.tokenizer_checksum, self.resolution)

    def mixture(self, chat: ChatTemplate, micro_batch: int, seed: int, rank: int, ranks: int) -> Mixture:
        """A rank's micro-batches. ValueError, with its reason, for a source or a share that cannot be."""
        cache = self.cache()
        encode = Encode(chat, self.resolution, self.max_tokens, self.seen_pixels, cache)
        reading = ReadOptions(rank, ranks, seed, self.block, epochs=None, max_bad_fraction=self.max_bad_fraction)
        shares = {"generation": self.drawing_share, "understanding": 1 - self.drawing_share}
        ingredients = {}
        for name, source in self.sources.items():
            kind = modality(self.tasks[name])
            if shares[kind] and self.tasks[name] in self.wanted:
                steps = (Admit(self.tasks[name], self.held_out_fraction), encode)
                records = open_records(name, source, reading, self.quarantine, steps)
                ingredients[name] = MixtureSource(records, kind, source.weight)
        shows = any(self.tasks[name] != "generation" for name in ingredients)
        make = MakeBatch(SftCollator(chat, self.packs, shows), self.resolution, cache)
        return Mixture(ingredients, micro_batch, self.drawing_share, seed, rank, make)

    def loader(self, mixture: Mixture, seed: int, pin_memory: bool = False) -> StatefulDataLoader:
        """Prepares a mixture's batches in worker processes, and says where it is."""
        return StatefulDataLoader(
            mixture,
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=AHEAD if self.workers else None,
            collate_fn=as_it_is,
            pin_memory=pin_memory,
            # Its own, or a loader that is made again on resuming would draw from the generator of the training noise.
            generator=torch.Generator().manual_seed(seed),
        )


def as_it_is(batch):
    return batch


def modality(task: str) -> str:
    """What a task counts as in a batch: edits are drawings."""
    return "understanding" if task == "understanding" else "generation"


def task_of(name: str, source: RecordSource, quarantine: Path) -> str:
    """What a source is for: the task of its first usable record. Sets of edits may begin with a plain drawing.

    ValueError, with the name, where there is no usable record.
    """
    records = open_records(name, source, ReadOptions(seed=None, block=PEEK), quarantine)
    record = next(iter(records), None)
    if record is None:
        raise ValueError(f"source {name}: no usable record; see {quarantine / name}")
    return "editing" if source.layout == "editing" else record.task
