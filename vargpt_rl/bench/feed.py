"""Measure whether training waits for its data: ``python -m vargpt_rl.bench.feed``.

The same images of the shapes world, at twice the resolution and with a caption each, are stored as JSON lines next to a
folder, as Parquet and as a WebDataset tar. A learner rank's loader streams each format: its worker processes read,
check, decode, crop, encode and batch. First the loader runs at full speed (samples per second), then with a step of
SFT of the embedded model on every micro-batch, including the image tokenizer since there is no feature cache: this
gives the share of time spent waiting for a batch, which a run logs as ``data_wait``.
"""

import io
import json
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from vargpt_rl.bench.encode import write_records
from vargpt_rl.bench.harness import results_table
from vargpt_rl.common.console import print_table
from vargpt_rl.common.streams import make_outputs_lasting
from vargpt_rl.common.usage import print_usage_if_asked
from vargpt_rl.data.records.sources import RecordSource
from vargpt_rl.data.records.stream import RecordStream
from vargpt_rl.losses.supervised import sft_loss
from vargpt_rl.model.hub import EMBEDDED
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.prompt import ChatFormat
from vargpt_rl.stages import STAGES, freeze

RESOLUTION = 128
MICRO_BATCH = 16
WORKERS = 2
IMAGES = 512
BATCHES = 40
STEPS = 20
WARMUP = 8
"""Batches that are not counted: those that the workers prefetch while they start."""


@dataclass(frozen=True)
class LoadResult:
    """Speed of a stream of records."""

    samples_a_second: float
    step_seconds: float
    wait: float
    """Share of the steps' time spent waiting for batches."""


def write_sources(folder: Path, count: int, side: int) -> dict[str, RecordSource]:
    """Write the same records in each format."""
    write_records(folder, count, side)
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    images = {row["id"]: (folder / row["images"][0]).read_bytes() for row in rows}
    inside = [row | {"images": [{"bytes": images[row["id"]], "path": None}]} for row in rows]
    pq.write_table(pa.Table.from_pylist(inside), folder / "records.parquet", row_group_size=64)
    with tarfile.open(folder / "records.tar", "w") as archive:
        for row in rows:
            for suffix, data in (("json", json.dumps(row | {"images": []}).encode()), ("png", images[row["id"]])):
                member = tarfile.TarInfo(f"{row['id']}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    files = {"jsonl": "records.jsonl", "parquet": "records.parquet", "webdataset": "records.tar"}
    return {kind: RecordSource([str(folder / name)], kind) for kind, name in files.items()}


def measure(
    source: RecordSource, folder: Path, resolution: int, micro_batch: int, batches: int, steps: int
) -> LoadResult:
    """Stream ``batches`` micro-batches without training, then train ``steps`` steps, one micro-batch each."""
    model = Vargpt.from_pretrained(EMBEDDED, dtype=torch.float32)
    chat = ChatFormat(str(EMBEDDED), model.config)
    stage = STAGES["sft"]
    freeze(model.train(), stage)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    feed = RecordStream(
        sources={"shapes": source},
        tasks={"shapes": "generation"},
        quarantine=folder / "quarantine",
        max_bad_fraction=0.0,
        block=128,
        packs=True,
        workers=WORKERS,
        resolution=resolution,
    )

    def stream():
        return iter(feed.loader(feed.mixture(chat, micro_batch, seed=0, rank=0, ranks=1), seed=0))

    stream_B = stream()
    next(islice(stream_B, WARMUP, None))
    began = time.perf_counter()
    next(islice(stream_B, batches - 1, None))
    rate = batches * micro_batch / (time.perf_counter() - began)
    del stream_B

    stream_B = stream()
    waited = 0.0
    spent = 0.0
    for step in range(WARMUP + steps):
        began = time.perf_counter()
        batch = next(stream_B)
        received = time.perf_counter()
        with torch.no_grad():
            images_N3HW = (batch.pop("crops").float() / 127.5 - 1).permute(0, 3, 1, 2)
            batch["features"] = model.image_tokenizer.features(images_N3HW).half()
        sft_loss(model, batch, stage.noise, stage.text_weight)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= WARMUP:
            waited += received - began
            spent += time.perf_counter() - began
    return LoadResult(rate, spent / steps, waited / spent)


def main() -> int:
    """Print a row per format; return the exit code."""
    print_usage_if_asked(f"usage: {__doc__}")
    title = f"records at {RESOLUTION} px, micro-batches of {MICRO_BATCH}, {WORKERS} workers"
    table = results_table(title, ("format", "samples per second", "step, s", "waiting"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, source in write_sources(folder, IMAGES, 2 * RESOLUTION).items():
            found = measure(source, folder / kind, RESOLUTION, MICRO_BATCH, BATCHES, STEPS)
            figures = f"{found.samples_a_second:.0f}", f"{found.step_seconds:.2f}", f"{found.wait:.1%}"
            table.add_row(kind, *figures)
    print_table(table)
    return 0


if __name__ == "__main__":
    make_outputs_lasting()
    sys.exit(main())
