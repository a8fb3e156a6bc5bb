"""Batches of images for policy gradients: numbered Parquet files in a folder, one row per image.

The driver writes a file per batch while training runs; a file called ``stop`` ends training early.
"""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vargpt_rl.data.preferences import arrow_column
from vargpt_rl.storage.files import atomic_file

COLUMNS = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("reply", pa.string(), nullable=False),
        pa.field("resolution", pa.int32(), nullable=False),
        pa.field("bits", pa.binary(), nullable=False),  # packed (vargpt_rl.model.bits.pack)
        pa.field("seed", pa.int64()),
        pa.field("sampling", pa.string(), nullable=False),  # JSON object
        pa.field("tau", pa.float64(), nullable=False),  # temperature of the sampler and of the log-probabilities
        pa.field("version", pa.int64()),  # version of the weights that the worker drew with
        pa.field("learner_step", pa.int64(), nullable=False),  # optimizer steps of this job behind these weights
        pa.field("group", pa.int32(), nullable=False),  # the same number for images drawn and judged together
        pa.field("reward", pa.float64()),
        pa.field("advantage", pa.list_(pa.float64()), nullable=False),  # of the image, or of its prefix and the rest
        pa.field("sampler_by_scale", pa.list_(pa.float64())),  # log-probability by scale under the sampler, nats
        pa.field("reference_by_scale", pa.list_(pa.float64())),  # the same under the reference
    ]
)
"""Columns of a batch. Log-probabilities that the method does not take are null."""

STOP = "stop"
"""Name of the file that ends training once all files before it are used up."""


def batch_path(folder: Path, number: int) -> Path:
    """Path of a batch, counted from 0."""
    return folder / f"batch-{number:05d}.parquet"


def write_policy_batch(path: Path, rows: list[dict[str, object]]) -> None:
    """Write a batch atomically. ValueError, naming file and column, for a missing, unknown, empty or ill-typed value,
    or if the rows differ in resolution or temperature."""
    if not rows:
        raise ValueError(f"{path}: no image in the batch, expected at least one")
    for row in rows:
        if odd := sorted(row.keys() ^ set(COLUMNS.names)):
            raise ValueError(f"{path}: missing or unknown columns: {', '.join(odd)}")
    for name in ("resolution", "tau"):
        if len(values := {row[name] for row in rows}) > 1:
            raise ValueError(
                f"{path}: {name} is {sorted(values, key=str)}, expected the same for all images of a batch"
            )
    table = pa.table([arrow_column(path, field, rows) for field in COLUMNS], schema=COLUMNS)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)


def read_policy_batch(path: Path) -> list[dict]:
    """The rows of a batch. ValueError, naming the file, if it is damaged or has other columns than `COLUMNS`."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file, or damaged: {error}") from error
    if not table.schema.equals(COLUMNS):
        expected = json.dumps({field.name: str(field.type) for field in COLUMNS})
        found = json.dumps({field.name: str(field.type) for field in table.schema})
        raise ValueError(f"{path}: columns {found}, expected {expected}")
    return table.to_pylist()
