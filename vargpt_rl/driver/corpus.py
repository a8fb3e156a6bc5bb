"""The corpus of a supervised stage: images encoded once by the workers, for the learners to read as features."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from actors.worker import EncodedImage, Failure, Worker
from vargpt_rl.data.samples import Prompt, Record
from vargpt_rl.driver.session import StageContext
from vargpt_rl.storage.files import sync, write_atomically

PROMPTS = "prompts.jsonl"
"""The file of a corpus that is written last."""


def encode_corpus(it: StageContext, records: list[Record], folder: Path) -> dict:
    """Encode training images into ``folder`` (see ``learners.sft.Drawings``); return counts.

    Images that prompts show stay keys, which the learners load; unreadable ones are found here.
    """
    if (folder / PROMPTS).exists():  # finished before the run was interrupted
        count = len((folder / PROMPTS).read_text().splitlines())
        return {"images": count, "failed": len(records) - count}
    kept: list[Record] = []
    features: list[np.ndarray] = []
    results = it.pool.run(Worker.encode, [record.image for record in records], it.resolution)
    unreadable = _unreadable(it, [record.prompt for record in records])
    for record, encoded in zip(records, results, strict=True):
        result: EncodedImage | Failure = unreadable.get(record.prompt.shown or "") or encoded
        if isinstance(result, Failure):
            it.inputs.quarantine.add(result.key, record.prompt.text, result.reason)
            continue
        kept.append(record)
        features.append(result.features)
    if not kept:
        quarantine = it.inputs.quarantine.path
        raise ValueError(f"none of {len(records)} training images could be read; see {quarantine}")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"features": np.stack(features)}, folder / "features.safetensors")
    sync(folder / "features.safetensors")
    lines = [json.dumps(asdict(record.prompt)) for record in kept]
    write_atomically(folder / PROMPTS, ("\n".join(lines) + "\n").encode())
    return {"images": len(kept), "failed": len(records) - len(kept)}


def delete_corpus(folder: Path) -> None:
    """Delete a corpus, its marker first: without it, what is left does not count."""
    (folder / PROMPTS).unlink()
    shutil.rmtree(folder)


def _unreadable(it: StageContext, prompts: list[Prompt]) -> dict[str, Failure]:
    """Return the images shown by prompts that cannot be loaded, by key."""
    shown = dict.fromkeys((p.shown, p.shown_side) for p in prompts if p.shown is not None)
    found = {}
    for side in {side for _, side in shown}:
        keys = [key for key, of_side in shown if of_side == side]
        failures = it.pool.run(Worker.find_unreadable, keys, side)
        found |= {failure.key: failure for failure in failures if failure is not None}
    return found
