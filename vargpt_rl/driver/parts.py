"""Long work of a step in parts of a bounded number of items, each kept on disk until its step is recorded.

A step that is interrupted resumes after its last part, however many items it has. Each part is a JSON file that names
its items by a hash and has a hash of its own: a damaged part, or one of other items, is done again.
"""

import base64
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from actors.worker import ImageScore
from vargpt_rl.common.failpoints import point
from vargpt_rl.data.samples import Prompt, Sample
from vargpt_rl.driver.session import StageContext
from vargpt_rl.driver.state import hash_of
from vargpt_rl.storage.files import content_hash, write_atomically

Item = TypeVar("Item")

FEWEST_ITEMS = 1024
"""Fewest items of a part by default."""
FEWEST_BATCHES = 16
"""Fewest batches of each worker in a part by default: at a part's end workers wait for the last one's batch."""


def part_size(context: StageContext, unit: int) -> int:
    """Return the number of items of a part, a multiple of ``unit``."""
    rollout = context.config.rollout
    wanted = rollout.keep_every or max(FEWEST_ITEMS, FEWEST_BATCHES * rollout.workers * rollout.images_at_once)
    return unit * math.ceil(wanted / unit)


def in_parts(
    context: StageContext, name: str, items: list[Item], work: Callable[[list[Item]], dict[str, Any]], unit: int = 0
) -> Iterator[dict[str, Any]]:
    """Yield ``work(part)``, a JSON object, for each part of ``items``: from disk if it was done before.

    ``name`` is unique within the step. Parts are multiples of ``unit`` items, by default of a worker's batch.
    """
    size = part_size(context, unit or context.config.rollout.images_at_once)
    for at in range(0, len(items), size):
        part = items[at : at + size]
        path = context.run.parts / name / f"{at:08d}.json"
        key = content_hash(repr(part).encode())
        found = _read(context, path, key)
        if found is None:
            with context.run.progress.part_of(at, len(items)):
                found = work(part)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps({"items": key, "hash": hash_of(found), "found": found}).encode())
            point(f"parts/{context.name}/{name}/{at}")
        yield found


def _read(context: StageContext, path: Path, key: str) -> dict[str, Any] | None:
    """Return the result of a part from disk; None if there is none, if it is damaged or of other items."""
    try:
        kept = json.loads(path.read_bytes())
        if kept["items"] != key:
            return None
        if kept["hash"] != hash_of(kept["found"]):
            raise ValueError("its hash differs")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        context.run.note(f"doing a part again: {path} is damaged ({error})")
        return None
    return kept["found"]


def packed(bits: bytes) -> str:
    """Return bytes as text for JSON (base64)."""
    return base64.b64encode(bits).decode()


def unpacked(text: str) -> bytes:
    """Return the bytes of `packed`."""
    return base64.b64decode(text)


def sample_fields(sample: Sample) -> dict[str, Any]:
    """Return a sample as JSON."""
    return asdict(sample) | {"bits": packed(sample.bits)}


def sample_of(fields: dict[str, Any]) -> Sample:
    """Return the sample of `sample_fields`."""
    return Sample(**fields | {"prompt": Prompt(**fields["prompt"]), "bits": unpacked(fields["bits"])})


def score_fields(score: ImageScore) -> list[Any]:
    """Return a score as JSON."""
    return [score.total, score.by_scale, score.hits_by_scale]


def score_of(fields: list[Any]) -> ImageScore:
    """Return the score of `score_fields`."""
    return ImageScore(*fields)
