"""Encode the images of training records once, so that supervised training never runs the image tokenizer:

    python -m vargpt_rl.data.encode checkpoint=DIR out=DIR resolution=256 crops=2 \\
        'sources.NAME.files=[FILE,...]' sources.NAME.format=jsonl sources.NAME.layout=native

The images that records have the model draw, edits included, are cut to ``crops`` squares each (see
``vargpt_rl.data.images.random_crop``) and their features written to the cache ``out`` (``vargpt_rl.data.features``).
All crops are random, as in the published training; a crop's position follows from the image file's sha256 and the
crop's number alone. A file that occurs several times is encoded once.

The same command resumes after an interruption; more ``crops`` or sources add to the cache. ``world`` processes share
the records, each with its own ``rank``, and take GPUs in turn if there are any. An image that several of them read may
be encoded by each. Features do not depend on any of this: every batch is padded to the same shape, so the sums over
each image have the same order.

Records that cannot be used are written to ``out/quarantine``. Exit codes: 0 done, 1 more than ``max_bad_fraction`` of
the records are bad (the others are encoded), 2 a setting or an input is wrong.

Shape legend: B batch, H W square images, d bits a token, h w latent grid.
"""

import shutil
import sys
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from vargpt_rl.common.bars import progress_bar
from vargpt_rl.common.command import CommandFailed, run_command
from vargpt_rl.common.settings import Count, CountOrNone, Share
from vargpt_rl.data.features import FeatureCache, FeatureWriter, load_image_tokenizer, shard_files, tokenizer_checksum
from vargpt_rl.data.images import random_crop
from vargpt_rl.data.quarantine import Quarantine
from vargpt_rl.data.records.images import ImageRef, content_sha256, load
from vargpt_rl.data.records.reader import ReadOptions, Records
from vargpt_rl.data.records.schema import DRAWN, RecordConversation, placeholders
from vargpt_rl.data.records.sources import RecordSource, open_records
from vargpt_rl.model.families import AnyImageTokenizer
from vargpt_rl.model.hub import TINY, check_model
from vargpt_rl.model.scales import schedule_for

IMAGES, SAME, ENCODED, KEPT = "images to draw", "repeated images", "crops encoded", "kept"
RECORDS, BAD = "records", "bad records"


@dataclass
class Encoding:
    """Settings of the command."""

    out: Path
    """Folder of the cache."""
    sources: dict[str, RecordSource] = field(default_factory=dict)
    """Sources of records by name."""
    checkpoint: str = TINY
    """"tiny" or a model directory."""
    resolution: int = 256
    """Pixels a side of the crops."""
    crops: Count = 1
    """Crops of each image."""
    batch_size: Count = 32
    """Images encoded together."""
    workers: CountOrNone = 2
    """Processes that decode images for each encoding one."""
    rank: int = 0
    """This process among the ``world`` processes that share the records."""
    world: int = 1
    max_bad_fraction: Share = 0.05
    """Fraction of the records that may be unusable."""

    def __post_init__(self):
        schedule_for(self.resolution)
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank={self.rank}: expected 0 or more and less than world={self.world}")
        if not self.sources:
            raise ValueError("sources are not given: expected sources.NAME.files=[FILE,...]")


class CropsToEncode(NamedTuple):
    """An image to draw: its file's sha256, and uint8 [H, W, 3] of each crop to encode, by number."""

    content: str
    crops: dict[int, np.ndarray]


def crops_of(reference: ImageRef, content: str, resolution: int, numbers: Iterable[int]) -> dict[int, np.ndarray]:
    """Cut the crops with these numbers: uint8 [H, W, 3]. Raises BadRecord for an image that cannot be decoded."""
    image = load(reference)
    generators = {number: np.random.default_rng([int(content, 16), number]) for number in numbers}
    return {number: np.asarray(random_crop(image, resolution, rng)) for number, rng in generators.items()}


def drawn_images(
    record: RecordConversation, resolution: int, crops: int, there: Container[tuple[str, int]]
) -> list[CropsToEncode]:
    """Return the images that ``record`` has drawn, with the crops that are not ``there`` yet. Raises BadRecord."""
    marks = [mark for message in record.messages for mark in placeholders(message.text)]
    drawn = []
    for reference in (image for image, mark in zip(record.images, marks, strict=True) if mark == DRAWN):
        content = content_sha256(reference)
        missing = [number for number in range(crops) if (content, number) not in there]
        drawn.append(CropsToEncode(content, crops_of(reference, content, resolution, missing) if missing else {}))
    return drawn


class Counted(IterableDataset):
    """The items of ``records``; at the end the numbers of records that a worker read and of bad ones among them."""

    def __init__(self, records: Records):
        self.records = records

    def __iter__(self) -> Iterator[list[CropsToEncode] | tuple[int, int]]:
        iterator = iter(self.records)
        yield from iterator
        state = iterator.state_dict()
        yield state["seen"], state["lost"]


def fresh_crops(
    command: Encoding, quarantine: Path, there: Container[tuple[str, int]], counts: Counter[str]
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yield sha256, number and uint8 [H, W, 3] of each crop that is not ``there``; count what is read in ``counts``."""
    # Whether too many are bad is decided at the end, over all workers.
    reading = ReadOptions(rank=command.rank, world=command.world, seed=None, max_bad_fraction=1.0)
    step = partial(drawn_images, resolution=command.resolution, crops=command.crops, there=there)
    opened = [open_records(name, source, reading, quarantine, (step,)) for name, source in command.sources.items()]
    seen: set[bytes] = set()
    for records in opened:
        # Not collated: arrays would become tensors, and each tensor takes a file descriptor to travel.
        loader = DataLoader(Counted(records), None, num_workers=command.workers, collate_fn=lambda item: item)
        for item in loader:
            if isinstance(item, tuple):
                counts.update({RECORDS: item[0], BAD: item[1]})
                continue
            for drawn in item:
                content = bytes.fromhex(drawn.content)
                counts.update({IMAGES: 1, SAME: content in seen})
                if content not in seen:
                    seen.add(content)
                    counts.update({ENCODED: len(drawn.crops), KEPT: command.crops - len(drawn.crops)})
                    yield from ((drawn.content, number, pixels) for number, pixels in drawn.crops.items())


@torch.inference_mode()
def features_of(tokenizer: AnyImageTokenizer, images: list[np.ndarray], batch: int, device: torch.device) -> np.ndarray:
    """Encode at most ``batch`` images uint8 [H, W, 3] to float16 [B, d, h, w], whatever else is in the batch."""
    images_BHW3 = np.stack(images + [images[-1]] * (batch - len(images)))
    images_B3HW = (torch.from_numpy(images_BHW3).to(device).float() / 127.5 - 1).permute(0, 3, 1, 2)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        features_Bdhw = tokenizer.features(images_B3HW)
    return features_Bdhw[: len(images)].half().cpu().numpy()


def encode(command: Encoding) -> Counter[str]:
    """Write the missing features; return counts of what was read and encoded."""
    folder = Path(check_model(command.checkpoint))
    tokenizer = load_image_tokenizer(folder)
    tokenizer.schedule_for(command.resolution)  # raises for a size that the model does not generate
    checksum = tokenizer_checksum(tokenizer.state_dict())
    made = (command.out, checksum, command.resolution)
    there: Container[tuple[str, int]] = FeatureCache(*made) if shard_files(command.out) else ()
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", command.rank % gpus) if gpus else torch.device("cpu")
    tokenizer.to(device)

    quarantine = command.out / "quarantine" / f"rank-{command.rank}-of-{command.world}"
    shutil.rmtree(quarantine, ignore_errors=True)  # an earlier run's, of the same records
    counts: Counter[str] = Counter()
    fresh = fresh_crops(command, quarantine, there, counts)
    with FeatureWriter(*made) as writer:
        remaining = iter(progress_bar(fresh, name="encode", unit=" crops"))
        while batch := list(islice(remaining, command.batch_size)):
            features_Bdhw = features_of(tokenizer, [pixels for *_, pixels in batch], command.batch_size, device)
            for (content, number, _), features_dhw in zip(batch, features_Bdhw, strict=True):
                writer.add(content, number, features_dhw)
    for path in sorted(quarantine.rglob("*.jsonl")):
        counts.update({f"bad: {reason}": count for reason, count in Quarantine(path).counts.items()})
    if command.world == 1 and not counts[IMAGES] and not counts[BAD]:
        raise ValueError(f"sources {', '.join(command.sources)}: no record draws an image")
    return counts


def execute(command: Encoding) -> None:
    """Encode and print the counts. Raises CommandFailed if too many records are bad."""
    counts = encode(command)
    for what in (RECORDS, BAD, IMAGES, SAME, ENCODED, KEPT, *sorted(what for what in counts if ": " in what)):
        print(f"{counts[what]:8d}  {what}")
    if counts[BAD] > command.max_bad_fraction * counts[RECORDS]:
        raise CommandFailed(
            f"{counts[BAD]} of {counts[RECORDS]} records are bad, more than max_bad_fraction="
            f"{command.max_bad_fraction}, see {command.out / 'quarantine'}"
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit code."""
    return run_command(Encoding, execute, arguments)


if __name__ == "__main__":
    sys.exit(main())
