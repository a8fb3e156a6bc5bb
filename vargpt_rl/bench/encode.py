"""Compare SFT on cached features with running the image tokenizer in the step: ``python -m vargpt_rl.bench.encode``.

The real command encodes images of the shapes world (its rate includes start-up). Then steps of SFT on the embedded
model, with the demo's micro-batches, alternate between features read from the cache and features computed from the
decoded crops. Both give the loss the same features. Times are the best of several, in one process.

Shape legend: B rows, d bits per token, h w latent grid.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from configs.load import load_config
from vargpt_rl.bench.harness import results_table, timed
from vargpt_rl.common.console import print_table
from vargpt_rl.common.streams import make_outputs_lasting
from vargpt_rl.common.usage import print_usage_if_asked
from vargpt_rl.data.batches import DrawExample, SftCollator
from vargpt_rl.data.encode import ENCODED, Encoding, crops_of, encode, features_of
from vargpt_rl.data.features import FeatureCache, shard_files, tokenizer_checksum
from vargpt_rl.data.records.images import content_sha256, on_disk
from vargpt_rl.data.records.sources import RecordSource
from vargpt_rl.data.samples import Prompt
from vargpt_rl.data.shapes import render, sample_scene
from vargpt_rl.losses.supervised import sft_loss
from vargpt_rl.model.hub import EMBEDDED
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.prompt import REPLY, ChatFormat
from vargpt_rl.stages import STAGES, freeze

RESOLUTIONS = (128, 256)
IMAGES = 256
CROPS = 2
ROUNDS = 9


@dataclass(frozen=True)
class EncodeResult:
    """Cost of a step both ways, and of encoding."""

    cached: float
    """Seconds of a step on cached features."""
    tokenized: float
    """Seconds of a step that runs the image tokenizer."""
    difference: float
    """Largest difference between the two features."""
    bytes_a_crop: float
    """Bytes of the cache per crop."""
    crops_a_second: float
    """Crops encoded per second."""


def write_records(folder: Path, count: int, side: int) -> list[str]:
    """Write ``count`` images and their ``records.jsonl``; return the captions."""
    rng = np.random.default_rng(0)
    captions = []
    lines = []
    for number in range(count):
        scene = sample_scene(rng)
        render(scene, side, "commercial", rng).save(folder / f"{number}.png")
        turns = [("user", scene.caption), ("assistant", f"{REPLY}<image_gen>")]
        messages = [{"role": role, "content": text} for role, text in turns]
        lines.append({"id": str(number), "task": "generation", "messages": messages, "images": [f"{number}.png"]})
        captions.append(scene.caption)
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return captions


def stepper(model: Vargpt, chat: ChatFormat) -> Callable[[list[str], np.ndarray], None]:
    """Create a function that runs a step of SFT on captions and their features, float16 [B, d, h, w]."""
    stage = STAGES["sft"]
    collate = SftCollator(chat)
    freeze(model.train(), stage)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step(captions: list[str], features_Bdhw: np.ndarray) -> None:
        prompts = [Prompt("", caption, REPLY) for caption in captions]
        batch = collate([DrawExample(*pair) for pair in zip(prompts, features_Bdhw, strict=True)])
        sft_loss(model, batch, stage.noise, stage.text_weight)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def stored(cache: FeatureCache, digest: str) -> np.ndarray:
    """Read the features of an image's only crop."""
    features_dhw = cache.get(digest, 1)
    assert features_dhw is not None  # every crop was encoded
    return features_dhw


def measure(resolution: int, micro_batch: int, images: int = IMAGES, rounds: int = ROUNDS) -> EncodeResult:
    """Encode ``images`` and train on them: ``rounds`` steps each way, after one that is not counted."""
    model = Vargpt.from_pretrained(EMBEDDED, dtype=torch.float32)
    chat = ChatFormat(str(EMBEDDED), model.config)
    step = stepper(model, chat)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        captions = write_records(folder, images, 2 * resolution)
        source = RecordSource([str(folder / "records.jsonl")])
        encoding = Encoding(folder / "cache", {"shapes": source}, resolution=resolution, crops=CROPS)
        seconds, counts = timed(encode, encoding)
        size = sum(path.stat().st_size for path in shard_files(folder / "cache")) / counts[ENCODED]
        cache = FeatureCache(folder / "cache", tokenizer_checksum(model.image_tokenizer.state_dict()), resolution)

        cached, tokenized, difference = [], [], 0.0
        for number in range(rounds + 1):
            chosen = [(number * micro_batch + i) % images for i in range(micro_batch)]
            files = [on_disk(folder, f"{i}.png") for i in chosen]
            names = [content_sha256(file) for file in files]
            crops = [crops_of(file, digest, resolution, [1])[1] for file, digest in zip(files, names, strict=True)]
            texts = [captions[i] for i in chosen]

            began = time.perf_counter()
            read_Bdhw = np.stack([stored(cache, digest) for digest in names])
            step(texts, read_Bdhw)
            between = time.perf_counter()
            computed_Bdhw = features_of(model.image_tokenizer, crops, micro_batch, torch.device("cpu"))
            step(texts, computed_Bdhw)
            ended = time.perf_counter()

            cached.append(between - began)
            tokenized.append(ended - between)
            difference = max(difference, float(np.abs(read_Bdhw.astype(np.float32) - computed_Bdhw).max()))
    return EncodeResult(
        cached=min(cached[1:]),
        tokenized=min(tokenized[1:]),
        difference=difference,
        bytes_a_crop=size,
        crops_a_second=counts[ENCODED] / seconds,
    )


def main() -> int:
    """Print a row per resolution; return the exit code."""
    print_usage_if_asked(f"usage: {__doc__}")
    columns = (
        "px",
        "micro-batch",
        "cached, s",
        "computed, s",
        "ratio",
        "difference",
        "bytes/crop",
        "crops/s",
    )
    table = results_table("a step of SFT with cached or computed features", columns)
    for resolution in RESOLUTIONS:
        micro_batch = load_config([]).at_resolution(resolution).sft.recipe.micro_batch
        found = measure(resolution, micro_batch)
        table.add_row(
            str(resolution),
            str(micro_batch),
            f"{found.cached:.3f}",
            f"{found.tokenized:.3f}",
            f"{found.tokenized / found.cached:.2f}",
            f"{found.difference:.4f}",
            f"{found.bytes_a_crop:.0f}",
            f"{found.crops_a_second:.1f}",
        )
    print_table(table)
    return 0


if __name__ == "__main__":
    make_outputs_lasting()
    sys.exit(main())
