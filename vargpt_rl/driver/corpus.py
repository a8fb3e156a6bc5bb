"""The corpus of a supervised stage: records of the data source, whose images the workers encode once, as a stream."""

from collections.abc import Sequence
from pathlib import Path

from actors.worker import Failure, Worker
from vargpt_rl.common.failpoints import point
from vargpt_rl.data.features import FeatureCache, FeatureWriter, drop_damaged, shard_files
from vargpt_rl.data.records.images import key_sha256
from vargpt_rl.data.records.stream import RecordStream, corpus_stream
from vargpt_rl.data.samples import ImageQuestion, Prompt, Record
from vargpt_rl.driver.parts import part_size
from vargpt_rl.driver.session import StageContext


def open_corpus(
    context: StageContext, records: list[Record], questions: Sequence[ImageQuestion], drawing_share: float, folder: Path
) -> tuple[RecordStream, dict[str, int]]:
    """Encode the records' images into ``folder``; return the stream of records and questions, and counts."""
    readable = encode_corpus(context, records, folder)
    context.inputs.check_quarantine()
    stream = corpus_stream(
        context.source,
        readable,
        questions,
        encoded=folder,
        resolution=context.resolution,
        drawing_share=drawing_share,
        seen_side=context.config.data.seen_side,
        max_bad_fraction=context.config.data.max_bad_fraction,
    )
    return stream, {"images": len(readable), "failed": len(records) - len(readable)}


def encode_corpus(context: StageContext, records: list[Record], folder: Path) -> list[Record]:
    """Encode training images into a feature cache below ``folder``; return the records whose images are readable.

    Images in the cache are not encoded again. ValueError if no image is readable.
    """
    cache = (folder / str(context.resolution), "", context.resolution)
    for damage in drop_damaged(*cache):
        context.run.note(f"encoding again: {damage}")
    known = FeatureCache(*cache) if shard_files(cache[0]) else ()
    keys = [key for key in dict.fromkeys(record.image for record in records) if (key_sha256(key), 0) not in known]
    failures = _unreadable(context, [record.prompt for record in records])
    size = part_size(context, context.config.rollout.images_at_once)
    for at in range(0, len(keys), size):  # the cache keeps what is done
        part = keys[at : at + size]
        with context.run.progress.part_of(at, len(keys)), FeatureWriter(*cache) as writer:
            for key, result in zip(part, context.pool.run(Worker.encode, part, context.resolution), strict=True):
                if isinstance(result, Failure):
                    failures[key] = result
                else:
                    writer.add(key_sha256(key), 0, result.features)
        point(f"parts/{context.name}/features/{at}")
    quarantine = context.inputs.quarantine
    readable = []
    for record in records:
        failure = failures.get(record.prompt.shown or "") or failures.get(record.image)
        if failure is None:
            readable.append(record)
        else:
            quarantine.add(failure.key, record.prompt.text, failure.reason)
    if not readable:
        raise ValueError(f"none of {len(records)} training images could be read; see {quarantine.path}")
    return readable


def _unreadable(context: StageContext, prompts: list[Prompt]) -> dict[str, Failure]:
    """Return the images shown by prompts that cannot be loaded, by key."""
    shown = dict.fromkeys((p.shown, p.shown_side) for p in prompts if p.shown is not None)
    found = {}
    for side in {side for _, side in shown}:
        keys = [key for key, of_side in shown if of_side == side]
        failures = context.pool.run(Worker.find_unreadable, keys, side)
        found |= {failure.key: failure for failure in failures if failure is not None}
    return found
