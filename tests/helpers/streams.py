"""Small sources of training records: drawings and edits in tars and lines, questions with and without images."""

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from learners.config import Recipe
from learners.jobs import SftJob
from tests.helpers.tiny import Patches
from vargpt_rl.data.features import FeatureWriter
from vargpt_rl.data.records.images import key_sha256
from vargpt_rl.data.records.sources import RecordSource
from vargpt_rl.data.records.stream import RecordStream, corpus_stream
from vargpt_rl.data.samples import ImageQuestion, Probe, Prompt, Record
from vargpt_rl.storage.checkpoint import Policy

COUNT = 24
TASKS = {"lines": "generation", "tars": "generation", "questions": "understanding"}


def encoded_image(seed: int, size: tuple[int, int] = (90, 70)) -> bytes:
    """A PNG of one colour with a lighter quarter, both by its seed."""
    red, green, blue = np.random.default_rng(seed).integers(0, 200, 3).tolist()
    image = Image.new("RGB", size, (red, green, blue))
    image.paste((red + 50, green + 50, blue + 50), (size[0] // 2, 0, size[0], size[1] // 2))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def native(identity: str, task: str, texts: list[str], images: list[str]) -> dict:
    roles = ("user", "assistant")
    messages = [{"role": roles[turn % 2], "content": text} for turn, text in enumerate(texts)]
    return {"id": identity, "task": task, "messages": messages, "images": images}


def drawing(number: int) -> dict:
    """Every sixth draws two images, in two turns."""
    if number % 6:
        texts = [f"Draw number {number}.", "Here is the picture.<image_gen>"]
        return native(f"line-{number}", "generation", texts, [f"{number}.png"])
    texts = [f"Draw number {number}.", "First:<image_gen>Like it?", "Another.", "<image_gen>"]
    return native(f"line-{number}", "generation", texts, [f"{number}.png", f"{number + 1}.png"])


def question(number: int) -> dict:
    """In LLaVA's layout; every other is about an image."""
    seen = number % 2 == 0
    turns = [("human", "<image>\nWhich colour?" if seen else f"Say {number}."), ("gpt", f"number {number}")]
    row = {"id": f"q{number}", "conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
    return row | ({"image": f"{number}.png"} if seen else {})


def write_sources(folder: Path) -> dict[str, RecordSource]:
    """The sources of ``TASKS``, with their files in ``folder``."""
    folder_of_images = folder / "images"
    folder_of_images.mkdir(parents=True)
    for number in range(COUNT + 1):
        (folder_of_images / f"{number}.png").write_bytes(encoded_image(number))
    for name, row in (("lines", drawing), ("questions", question)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row(number)) + "\n" for number in range(COUNT)))
    with tarfile.open(folder / "drawings.tar", "w") as archive:
        for number in range(COUNT):
            row = native(f"tar-{number}", "generation", [f"Draw {number}, please.", "<image_gen>Done."], [])
            for suffix, data in (("json", json.dumps(row).encode()), ("png", encoded_image(100 + number))):
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    images = str(folder_of_images)
    return {
        "lines": RecordSource([str(folder / "lines.jsonl")], images=images),
        "tars": RecordSource([str(folder / "*.tar")], "webdataset"),
        "questions": RecordSource([str(folder / "questions.jsonl")], layout="llava", images=images),
    }


def feed_of(folder: Path, sources: dict[str, RecordSource], **changes) -> RecordStream:
    """A feed of the sources at 64 px, a half of each batch drawings."""
    settings = dict(
        quarantine=folder / "quarantine", held_out_fraction=0.0, max_bad_fraction=0.05, block=5, max_tokens=400,
        seen_pixels=56 * 56, packs=True, workers=0, resolution=64, drawing_share=0.5,
    )  # fmt: skip
    return RecordStream(**(dict(sources=sources, tasks=TASKS) | settings | changes))


def corpus_of(folder: Path, features: np.ndarray, questions: Sequence[ImageQuestion] = (), **changes) -> RecordStream:
    """A stream of encoded images [N, d, h, w] of captions of two lengths, and of questions about `Patches`."""
    resolution = 16 * features.shape[-1]
    records = [
        Record(str(i), Prompt(str(i), "a red circle " * (1 + i % 2), "Here:"), f"#{i:06d}")
        for i in range(len(features))
    ]
    with FeatureWriter(folder / str(resolution), "", resolution) as writer:
        for record, features_dhw in zip(records, features, strict=True):
            writer.add(key_sha256(record.image), 0, features_dhw.astype(np.float16))
    stream = corpus_stream(
        Patches(), records, questions, encoded=folder, resolution=resolution, drawing_share=0.5, seen_side=56
    )
    return replace(stream, **changes)


def sft_job(
    stage: str, start: Policy, stream: RecordStream, recipe: Recipe, output: Path, probe: Probe, **more
) -> SftJob:
    """A job with seed 0."""
    return SftJob(stage=stage, start=start, stream=stream, recipe=recipe, output=output, seed=0, probe=probe, **more)
