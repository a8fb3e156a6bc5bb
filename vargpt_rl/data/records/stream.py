"""Micro-batches of a supervised stage, streamed from records in each learner rank.

Worker processes read conversations, load and encode their images ahead of the training step, and hold no more than a
block of records and a few batches. Every micro-batch has the same share of images to draw ("dynamic batch balancing
between modalities", VARGPT-v1.1, section 4.1). Images to draw are random crops whose features the learner computes,
or features from a cache. All randomness follows from the seed and the batch's position, so a resumed stream yields
the same batches as one that was never interrupted.

Shape legend: H W image, d bits a token, h w latent grid.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchdata.stateful_dataloader import StatefulDataLoader

from vargpt_rl.data.batches import Row, SftCollator
from vargpt_rl.data.features import FeatureCache
from vargpt_rl.data.images import ImageSource, random_crop
from vargpt_rl.data.mixture import Mixture, MixtureSource
from vargpt_rl.data.quarantine import BadRecord
from vargpt_rl.data.records.corpus import Corpus, drawing, question
from vargpt_rl.data.records.images import ImageRef, content_sha256, load
from vargpt_rl.data.records.reader import ReadOptions
from vargpt_rl.data.records.schema import DRAWN, SHOWN, RecordConversation, pieces, placeholders
from vargpt_rl.data.records.sources import RecordSource, open_records
from vargpt_rl.data.samples import ImageQuestion, Record
from vargpt_rl.data.sources import is_held_out
from vargpt_rl.model.prompt import ChatTemplate, EncodedText, ImageToDraw, Part, VisionInputs
from vargpt_rl.model.scales import token_count

PEEK = 16
"""Rows that are read to find the task of a source."""
EDITS = ("editing",)
"""Tasks of the editing stage."""
AHEAD = 4
"""Batches that each worker prepares ahead."""


class Cached(NamedTuple):
    """An image in the feature cache: its sha256 there, and the numbers of its crops."""

    content: str
    crops: tuple[int, ...]


@dataclass(frozen=True)
class EncodedConversation:
    """An encoded conversation. Images to draw are not cropped yet: that differs from batch to batch."""

    text: EncodedText
    vision: VisionInputs | None
    drawn: tuple[Image.Image | Cached, ...]


@dataclass(frozen=True)
class Admit:
    """Step of `Records` that admits conversations of a source for ``task`` and leaves out held-out images to draw.

    A source of edits may have images drawn without one shown, but tasks are not mixed otherwise: if no batch shows an
    image, the vision tower need not run.
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
    """Step of `Records` that encodes conversations for training at one ``resolution``.

    Raises BadRecord for an image that is unusable or not in ``cache``, and for rows above ``max_tokens``.
    """

    chat: ChatTemplate
    resolution: int
    max_tokens: int | None = None
    seen_pixels: int | None = None
    cache: FeatureCache | None = None
    images_first: bool = False
    """Put shown images before a user's words as the model family does when it is asked, not at their placeholders."""

    def __call__(self, record: RecordConversation) -> EncodedConversation:
        marks = [mark for message in record.messages for mark in placeholders(message.text)]
        found = list(zip(marks, record.images, strict=True))
        vision = self._shown([load(image) for mark, image in found if mark == SHOWN])
        text = self.chat.encode(self._turns(record, vision))
        if self.max_tokens is not None and len(text.ids) > self.max_tokens:
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
        grid = vision.image_grid_thw if vision else None
        shown = iter(self.chat.shown(grid))
        drawn = ImageToDraw(token_count(self.chat.config.image_tokenizer_config.schedule_for(self.resolution)))
        for message in record.messages:
            parts = pieces(message.text)
            if self.images_first and message.role == "user":
                yield message.role, self.chat.asked("".join(part for part in parts if part != SHOWN), grid)
                continue
            yield message.role, [next(shown) if part == SHOWN else drawn if part == DRAWN else part for part in parts]

    def _drawn(self, image: ImageRef) -> Image.Image | Cached:
        if self.cache is None:
            return load(image)
        content = content_sha256(image)
        crops = tuple(number for number in range(self.cache.crops) if (content, number) in self.cache)
        if not crops:
            raise BadRecord("image is not in the feature cache")
        return Cached(content, crops)


@dataclass(frozen=True)
class MakeBatch:
    """Make a batch of samples with `SftCollator`, with a random crop of each image to draw."""

    collate: SftCollator
    resolution: int
    cache: FeatureCache | None = None

    def __call__(self, samples: list[EncodedConversation], rng: np.random.Generator) -> dict[str, torch.Tensor]:
        rows = [Row(s.text, s.vision, tuple(self._crop(image, rng) for image in s.drawn)) for s in samples]
        return self.collate(rows)

    def _crop(self, image: Image.Image | Cached, rng: np.random.Generator) -> np.ndarray:
        """uint8 [H, W, 3], or float16 [d, h, w] from the cache."""
        if isinstance(image, Cached):
            features = self.cache.get(image.content, int(rng.choice(image.crops))) if self.cache is not None else None
            assert features is not None  # `Encode` found the crops in the cache
            return features
        return np.asarray(random_crop(image, self.resolution, rng))


@dataclass(frozen=True, kw_only=True)
class RecordStream:
    """Sources of records and how a supervised stage reads them. `at` sets what differs between stages."""

    sources: Mapping[str, RecordSource | Corpus]
    tasks: dict[str, str]
    """Task of each source, see `task_of`."""
    quarantine: Path
    """Folder that bad records are written to."""
    held_out_fraction: float = 0.0
    """Fraction of the images to draw that is left out, for evaluation. A `Corpus` has none of those."""
    max_bad_fraction: float = 0.01
    block: int = 1000
    max_tokens: int | None = None
    """Longer rows are quarantined."""
    seen_pixels: int | None = None
    """Largest shown image; None leaves it to the model."""
    packs: bool = False
    workers: int = 1
    encoded: Path | None = None
    """Folder of feature caches, one for each resolution; without it the learner runs the image tokenizer."""
    tokenizer_checksum: str = ""
    """Checksum of the image tokenizer that the caches must be of."""
    resolution: int = 0
    drawing_share: float = 1.0
    wanted: tuple[str, ...] = ("generation", "editing", "understanding")
    """Tasks that the stage learns from."""

    def at(self, resolution: int, drawing_share: float = 1.0, wanted: tuple[str, ...] | None = None) -> "RecordStream":
        """Return the stream of a stage that learns from the tasks ``wanted``, by default all but edits."""
        wanted = wanted or ("generation", "understanding")
        return replace(self, resolution=resolution, drawing_share=drawing_share, wanted=wanted)

    def cache(self) -> FeatureCache | None:
        """Open the cache of features. ValueError if it is of another image tokenizer."""
        if self.encoded is None:
            return None
        return FeatureCache(self.encoded / str(self.resolution), self.tokenizer_checksum, self.resolution)

    def mixture(self, chat: ChatTemplate, micro_batch: int, seed: int, rank: int, ranks: int) -> Mixture:
        """Return a rank's micro-batches. ValueError, with the reason, if a source or the share is impossible."""
        cache = self.cache()
        encode = Encode(
            chat=chat,
            resolution=self.resolution,
            max_tokens=self.max_tokens,
            seen_pixels=self.seen_pixels,
            cache=cache,
        )
        reading = ReadOptions(
            rank=rank,
            world=ranks,
            seed=seed,
            block=self.block,
            epochs=None,
            max_bad_fraction=self.max_bad_fraction,
        )
        shares = {"generation": self.drawing_share, "understanding": 1 - self.drawing_share}
        mixed = {}
        for name, source in self.sources.items():
            task = self.tasks[name]
            kind = modality(task)
            if not shares[kind] or task not in self.wanted:
                continue
            if isinstance(source, Corpus):
                shards = ranks * max(1, self.workers)
                steps: tuple[Callable, ...] = (replace(encode, images_first=True),)
                records = source.repeated(shards).open(name, reading, self.quarantine, steps)
            else:
                steps = (Admit(task, self.held_out_fraction), encode)
                records = open_records(name, source, reading, self.quarantine, steps)
            mixed[name] = MixtureSource(records, kind, source.weight)
        shows = any(self.tasks[name] != "generation" for name in mixed)
        make = MakeBatch(SftCollator(chat, self.packs, shows), self.resolution, cache)
        return Mixture(mixed, micro_batch, self.drawing_share, seed, rank, make)

    def loader(self, mixture: Mixture, seed: int, pin_memory: bool = False) -> StatefulDataLoader:
        """Return a loader that prepares a mixture's batches in worker processes and can be resumed."""
        return StatefulDataLoader(
            mixture,
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=AHEAD if self.workers else None,
            collate_fn=unchanged,
            pin_memory=pin_memory,
            # Its own: a loader that is made again on resuming must not advance the generator of the training noise.
            generator=torch.Generator().manual_seed(seed),
        )


def corpus_stream(
    source: ImageSource,
    records: list[Record],
    questions: Sequence[ImageQuestion] = (),
    *,
    encoded: Path,
    resolution: int,
    drawing_share: float = 1.0,
    seen_side: int = 0,
    max_bad_fraction: float = 0.01,
) -> RecordStream:
    """Return the stream of a data source's images and of questions about its images.

    ``encoded`` has the features of the images, under `vargpt_rl.data.records.images.key_sha256` of their keys; bad
    records are written there too. Questions show images ``seen_side`` pixels wide and high.
    """
    corpora = {"images": Corpus([drawing(record, source, resolution) for record in records])}
    if questions:
        corpora["questions"] = Corpus([question(asked, source, seen_side) for asked in questions])
    return RecordStream(
        sources=corpora,
        tasks={name: corpus.task for name, corpus in corpora.items()},
        quarantine=encoded / "quarantine",
        max_bad_fraction=max_bad_fraction,
        encoded=encoded,
        resolution=resolution,
        drawing_share=drawing_share if questions else 1.0,
    )


def unchanged(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch as it is: the mixture collates it already. A function of a module, so that workers can load it."""
    return batch


def modality(task: str) -> str:
    """Return the modality that a task counts as in a batch: edits are images to draw."""
    return "understanding" if task == "understanding" else "generation"


def task_of(name: str, source: RecordSource, quarantine: Path) -> str:
    """Return the task of a source: that of its first usable record. Sets of edits may begin with a plain drawing.

    ValueError, with the name, if there is no usable record.
    """
    records = open_records(name, source, ReadOptions(seed=None, block=PEEK), quarantine)
    record = next(iter(records), None)
    if record is None:
        raise ValueError(f"source {name}: no usable record; see {quarantine / name}")
    return "editing" if source.layout == "editing" else record.task
