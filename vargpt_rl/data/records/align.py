"""Prompts, winners and held-out records of the iterations, for runs that train on records.

Prompts come from a file; a winner is the image in a folder that is named after its prompt's id, with any ending. The
first generation records whose id is held out (``vargpt_rl.data.sources.is_held_out``) serve as held-out prompts; if the
folder has no winner for one, its own image replaces it.
"""

from collections.abc import Iterator
from hashlib import blake2b
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vargpt_rl.data.image_names import ImageNames
from vargpt_rl.data.images import read_image
from vargpt_rl.data.quarantine import Quarantine
from vargpt_rl.data.records.images import ImageRef, InRecord, OnDisk, load
from vargpt_rl.data.records.reader import ReadOptions
from vargpt_rl.data.records.schema import DRAWN, RecordConversation
from vargpt_rl.data.records.sources import RecordSource, open_records
from vargpt_rl.data.records.stream import RecordStream
from vargpt_rl.data.samples import Prompt
from vargpt_rl.data.sources import SPLITS, Source, is_held_out
from vargpt_rl.storage.files import write_atomically

HeldOut = tuple[Prompt, ImageRef]


def held_out_of(stream: RecordStream, count: int, folder: Path) -> list[HeldOut]:
    """Return the first ``count`` held-out records, of all generation sources in turn, as prompts with images.

    Records with several turns or images are skipped. Images that came in their records are written to ``folder``, since
    workers get references. ValueError if there is none.
    """

    def wanted(record: RecordConversation) -> HeldOut | None:
        single = len(record.messages) == 2 and len(record.images) == 1
        if record.task != "generation" or not single or not is_held_out(record.id, stream.held_out_fraction):
            return None
        request, reply = record.messages
        load(record.images[0])  # raises if it is unreadable
        return Prompt(record.id, request.text, reply.text.partition(DRAWN)[0]), record.images[0]

    reading = ReadOptions(seed=None, block=stream.block, max_bad_fraction=stream.max_bad_fraction)
    opened = [
        open_records(name, source, reading, stream.quarantine, (wanted,))
        for name, task in stream.tasks.items()
        if task == "generation" and isinstance(source := stream.sources[name], RecordSource)
    ]
    in_turn = (found for turn in zip_longest(*opened) for found in turn if found is not None)
    chosen = list(islice(_by_id(in_turn), count))
    if not chosen:
        raise ValueError(
            f"no record of data.sources is held out (data.held_out_fraction is {stream.held_out_fraction}), but the "
            f"iterations are measured on such: expected generation records of one request and one image"
        )
    return [(prompt, _referred(reference, folder)) for prompt, reference in chosen]


def _by_id(found: Iterator[HeldOut]) -> Iterator[HeldOut]:
    seen: set[str] = set()
    for prompt, reference in found:
        if prompt.id not in seen:
            seen.add(prompt.id)
            yield prompt, reference


def _referred(reference: ImageRef, folder: Path) -> ImageRef:
    """Return a reference to the image; one that came in its record is written to ``folder``."""
    if not isinstance(reference, InRecord):
        return reference
    folder.mkdir(parents=True, exist_ok=True)
    name = blake2b(reference.data, digest_size=16).hexdigest()
    write_atomically(folder / name, reference.data)
    return OnDisk(folder.resolve(), name)


class RecordsSource(Source):
    """Prompts and images of the iterations. Keys are "winners/<file>" and "held_out/<prompt id>".

    It has no records or questions: supervised stages stream theirs. Prompts without a winner are noted in the
    quarantine. A run without iterations has no prompts and no winners. ValueError if the folder is missing, or no
    prompt has a winner in it.
    """

    def __init__(self, prompts: list[Prompt], winners: Path | None, held_out: list[HeldOut], quarantine: Quarantine):
        if winners is not None and not winners.is_dir():
            raise ValueError(f"preference.winners={winners}: no such folder of images")
        self._winners = winners and winners.resolve()
        self._held_out = {prompt.id: (prompt, reference) for prompt, reference in held_out}
        texts = {prompt.text for prompt, _ in held_out}
        # Held-out prompts are never trained on, even if the file of prompts was made from the same records.
        self._prompts = [p for p in prompts if p.id not in self._held_out and p.text not in texts]
        names = ImageNames(self._winners) if self._winners else None
        self._files: dict[str, str] = {}
        for identity in [*(p.id for p in self._prompts), *self._held_out]:
            if found := names.stemmed(identity) if names else []:
                self._files[identity] = found[0]
            if len(found) > 1:
                quarantine.add(identity, ", ".join(found), "several winners, of which the first is taken", lost=False)
        without = [prompt for prompt in self._prompts if prompt.id not in self._files]
        for prompt in without:
            quarantine.add(prompt.id, prompt.text, "prompt without a winner", lost=False)
        if prompts and len(without) == len(self._prompts):
            expected = f"{prompts[0].id}.png"
            raise ValueError(
                f"preference.winners={winners}: no winner of {len(prompts)} prompts, expected names such as {expected}"
            )

    def load(self, key: str, side: int) -> Image.Image:
        """Load the middle of the image of ``key``: RGB, ``side`` pixels wide and high. Raises ValueError."""
        kind, _, name = key.partition("/")
        if kind == "winners" and name and self._winners:
            image = read_image(self._winners / name)
        elif kind == "held_out" and name in self._held_out:
            image = load(self._held_out[name][1])
        else:
            raise ValueError(f"image key {key!r}: expected 'winners/<file>' or 'held_out/<prompt id>'")
        return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        """Return ``count`` prompts of a split, or all if there are fewer."""
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}, expected one of {SPLITS}")
        found = self._prompts if split == "train" else [prompt for prompt, _ in self._held_out.values()]
        return [found[index] for index in np.random.default_rng(seed).permutation(len(found))[:count]]

    def winner_key(self, prompt: Prompt) -> str | None:
        """Return the key of the stronger system's image, or of a held-out record's own."""
        if prompt.id in self._files:
            return f"winners/{self._files[prompt.id]}"
        return f"held_out/{prompt.id}" if prompt.id in self._held_out else None
