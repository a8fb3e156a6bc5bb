"""The preference table: a Parquet file with a row for each pair, scored once by the reference policy.

    python -m vargpt_rl.data.preferences describe FILE

describes a table; ``pandas.read_parquet`` reads it.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vargpt_rl.common.command import run_program
from vargpt_rl.common.streams import make_outputs_lasting
from vargpt_rl.data.pair_statistics import describe
from vargpt_rl.data.samples import Prompt
from vargpt_rl.storage.files import atomic_file

# Bits are packed (vargpt_rl.model.bits.pack). Log-probabilities are in nats, summed over all bits of an image or over
# those of each scale. A reward is null if none was configured; seed (32 bits) and policy version are null if no policy
# generated the image; sampling is a JSON object.
COLUMNS = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("reply", pa.string(), nullable=False),
        pa.field("resolution", pa.int32(), nullable=False),
        pa.field("chosen_bits", pa.binary(), nullable=False),
        pa.field("rejected_bits", pa.binary(), nullable=False),
        pa.field("chosen_source", pa.string(), nullable=False),
        pa.field("rejected_source", pa.string(), nullable=False),
        pa.field("chosen_seed", pa.int64()),
        pa.field("chosen_version", pa.int64()),
        pa.field("rejected_seed", pa.int64()),
        pa.field("rejected_version", pa.int64()),
        pa.field("sampling", pa.string(), nullable=False),
        pa.field("chosen_reward", pa.float64()),
        pa.field("rejected_reward", pa.float64()),
        pa.field("reference_chosen_logp", pa.float64(), nullable=False),
        pa.field("reference_rejected_logp", pa.float64(), nullable=False),
        pa.field("reference_chosen_by_scale", pa.list_(pa.float64()), nullable=False),
        pa.field("reference_rejected_by_scale", pa.list_(pa.float64()), nullable=False),
        pa.field("reference_version", pa.int64(), nullable=False),
    ]
)
REFERENCES = tuple(f"reference_{side}_{what}" for side in ("chosen", "rejected") for what in ("logp", "by_scale"))
# Other writers, pandas among them, store the same values with wider offsets.
NARROW = {pa.large_string(): pa.string(), pa.large_binary(): pa.binary()}
# So that an integer stays one in a column with nulls.
INTEGERS = {pa.int64(): pd.Int64Dtype()}
ORIGIN = "origin"
"""Key, in the file's metadata and in ``attrs``, of the counts that a table was made from: `ORIGIN_COUNTS`."""
ORIGIN_COUNTS = {"samples", "prompts", "prompts_without_winner", "dropped_by_reason"}
"""Keys of the origin. A table that was made in parts also has ``parts``, the rows of each. One whose references were
scored in the micro-batches of a learner has ``micro_batch``, the pairs in each."""


def write_table(path: Path, rows: list[dict[str, Any]], origin: dict[str, Any] | None = None) -> None:
    """Write ``rows``, each with all of `COLUMNS`, atomically.

    ``origin`` counts what the pairs were made from, see `ORIGIN_COUNTS`. Raises ValueError, naming the pair or column,
    for a repeated pair id, a reference log-probability that is not finite, a missing or unknown column, or a value of
    the wrong type.
    """
    path = Path(path)
    for row in rows:
        if row.keys() != set(COLUMNS.names):
            odd = sorted(row.keys() ^ set(COLUMNS.names))
            raise ValueError(f"{path}: pair {row.get('pair_id')!r}: missing or unknown columns: {', '.join(odd)}")
    schema = COLUMNS.with_metadata({ORIGIN: json.dumps(origin)}) if origin else COLUMNS
    table = pa.table([arrow_column(path, field, rows) for field in COLUMNS], schema=schema)
    repeated = [name for name, count in Counter(row["pair_id"] for row in rows).items() if count > 1]
    if repeated:
        raise ValueError(f"{path}: {len(repeated)} pair ids occur more than once, among them {repeated[0]!r}")
    for name in REFERENCES:
        _check_finite(path, name, rows)
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)


def _check_finite(path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """ValueError, naming the first pair, if a reference log-probability, or one of its parts, is not finite."""
    values = [row[name] for row in rows]
    flat = np.concatenate([np.empty(0), *values]) if name.endswith("_by_scale") else np.array(values, float)
    if np.isfinite(flat).all():
        return
    bad = next(row for row in rows if not np.isfinite(row[name]).all())
    raise ValueError(f"{path}: pair {bad['pair_id']!r}: {name} is {bad[name]}, expected finite numbers")


def arrow_column(path: Path, field: pa.Field, rows: list[dict[str, object]]) -> pa.Array:
    """Return a column of ``rows``. ValueError, naming file and column, for an empty value or one of the wrong type."""
    try:
        column = pa.array([row[field.name] for row in rows], field.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise ValueError(f"{path}: column {field.name} is not of type {field.type}: {error}") from error
    if column.null_count and not field.nullable:
        raise ValueError(f"{path}: column {field.name} has {column.null_count} empty values")
    return column


def read_table(path: Path) -> pd.DataFrame:
    """Read a preference table: the columns of `COLUMNS`, in that order; others are dropped. Origin: see `ORIGIN`.

    Raises ValueError, naming file and column, if a column is missing, of the wrong type or has empty values.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file, or damaged: {error}") from error
    for field in COLUMNS:
        if field.name not in table.column_names:
            raise ValueError(f"{path}: column {field.name} is missing")
        column = table[field.name]
        if field.nullable and column.type == pa.float64() != field.type:
            column = _whole(column, field.type)
            table = table.set_column(table.column_names.index(field.name), field.name, column)
        if NARROW.get(column.type, column.type) != field.type:
            raise ValueError(f"{path}: column {field.name} is of type {column.type}, expected {field.type}")
        if column.null_count and not field.nullable:
            raise ValueError(f"{path}: column {field.name} has {column.null_count} empty values")
    frame = table.select(COLUMNS.names).to_pandas(types_mapper=INTEGERS.get)
    if text := (table.schema.metadata or {}).get(ORIGIN.encode()):
        origin = json.loads(text)
        if not isinstance(origin, dict) or origin.keys() - {"parts", "micro_batch"} != ORIGIN_COUNTS:
            raise ValueError(
                f"{path}: metadata {ORIGIN} is {text.decode()}, expected {', '.join(sorted(ORIGIN_COUNTS))}"
            )
        frame.attrs[ORIGIN] = origin
    return frame


def prompts_of(rows: pd.DataFrame) -> list[Prompt]:
    """Return the prompt of each row of a preference table."""
    return [Prompt(*row) for row in rows[["prompt_id", "prompt", "reply"]].itertuples(index=False)]


def part_path(table: Path, number: int) -> Path:
    """Return the path of part ``number`` of a table that is made in parts."""
    return table.with_suffix("") / f"part-{number:05d}.parquet"


def count_rows(table: Path) -> int:
    """Count the pairs of a table."""
    return pq.read_metadata(table).num_rows


def join_parts(table: Path, parts: list[Path]) -> dict[str, Any]:
    """Write the table of these parts, which stay. Return its origin: the sums of theirs, and the rows of each.

    Raises ValueError if no part has a row.
    """
    rows: list[dict[str, Any]] = []
    sizes: list[int] = []
    dropped: Counter[str] = Counter()
    sizes_of_batches: set[int | None] = set()
    origin: dict[str, Any] = dict.fromkeys(("samples", "prompts", "prompts_without_winner"), 0)
    for path in parts:
        with pq.ParquetFile(path) as file:
            part = file.read()
        made_of = json.loads(part.schema.metadata[ORIGIN.encode()])
        origin = {key: value + made_of[key] for key, value in origin.items()}
        dropped.update(made_of["dropped_by_reason"])
        sizes_of_batches.add(made_of.get("micro_batch"))
        rows += part.to_pylist()
        sizes.append(part.num_rows)
    if not rows:
        raise ValueError(f"no pair could be built of {origin['samples']} samples; dropped: {dict(dropped)}")
    origin |= {"dropped_by_reason": dict(dropped), "parts": sizes}
    same = sizes_of_batches.pop() if len(sizes_of_batches) == 1 else None
    write_table(table, rows, origin | ({"micro_batch": same} if same else {}))
    return origin


def _whole(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Cast integers that were written as floats, as pandas does if some are null. Other numbers stay as they are."""
    try:
        return column.cast(kind)
    except pa.ArrowInvalid:
        return column


def _describe(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path}: no such file, expected a preference table, as in runs/NAME/preferences")
    table = read_table(path)
    try:
        return describe(table)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    """Describe a table; return the exit code: 0 done, 2 not a preference table."""
    parser = argparse.ArgumentParser(prog="python -m vargpt_rl.data.preferences")
    commands = parser.add_subparsers(required=True, metavar="describe")
    commands.add_parser("describe", help="print what a preference table has").add_argument("file", type=Path)
    path = parser.parse_args(arguments).file
    return run_program(lambda _: print(_describe(path)), [])


if __name__ == "__main__":
    make_outputs_lasting()
    sys.exit(main())
