"""Does training wait for its data? ``python -m vargpt_rl.bench.feed``.

The same images of the shapes world, at twice the resolution and with a caption each, as JSON lines beside a folder,
as Parquet and as a WebDataset tar. Each is streamed by the loader of a learner rank: read, checked, decoded, cropped,
encoded and batched in worker processes. First as fast as it goes (samples a second), then with a step of SFT of the
embedded model on every micro-batch, the image tokenizer's features included as without a cache: the share of the time
that goes by until a batch is there. A run logs that share as ``data_wait``.
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
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vargpt_rl.bench.encode import write_records
from vargpt_rl.data.records.sources import RecordSource
from vargpt_rl.data.records.stream import RecordStream
from vargpt_rl.losses.supervised import sft_loss
from vargpt_rl.model.hub import EMBEDDED
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.prompt import ChatFormat
from vargpt_rl.stages import STAGES, freeze

RESOLUTION, MICRO_BATCH, WORKERS = 128, 16, 2
IMAGES, BATCHES, STEPS = 512, 40, 20
WARMUP = 8  # batches that are not counted: all that the workers prepare ahead while they start


@dataclass(frozen=True)
class LoadResult:
    """``wait``: the share of the steps' time until their batches were there."""

    samples_a_second: float
    step_seconds: float
    wait: float


def write_sources(folder: Path, count: int, side: int) -> dict[str, RecordSource]:
    """The same records in each format."""
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
    """Stream ``batches`` micro-batches without training, then train ``steps`` on as many."""
    model = Vargpt.from_pretrained(EMBEDDED, dtype=torch.float32)
    chat, stage = ChatFormat(str(EMBEDDED), model.config), STAGES["sft"]
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

    stream_B, waited, spent = stream(), 0.0, 0.0
    for step in range(WARMUP + steps):
        began = time.perf_counter()
        batch = next(stream_B)
        there = time.perf_counter()
        with torch.no_grad():
            images_N3HW = (batch.pop("crops").float() / 127.5 - 1).permute(0, 3, 1, 2)
            batch["features"] = model.image_tokenizer.features(images_N3HW).half()
        sft_loss(model, batch, stage.noise, stage.text_weight)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= WARMUP:
            waited, spent = waited + there - began, spent + time.perf_counter() - began
    return LoadResult(rate, spent / steps, waited / spent)


def main() -> int:
    """Print a row a format; the exit code."""
    title = f"records at {RESOLUTION} px, micro-batches of {MICRO_BATCH}, {WORKERS} workers"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("format", "samples a second", "a step, s", "of it waiting"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, source in write_sources(folder, IMAGES, 2 * RESOLUTION).items():
            found = measure(source, folder / kind, RESOLUTION, MICRO_BATCH, BATCHES, STEPS)
            figures = f"{found.samples_a_second:.0f}", f"{found.step_seconds:.2f}", f"{found.wait:.1%}"
            table.add_row(kind, *figures)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
