"""The preference table: a Parquet file with a row for each pair, scored once by the reference policy.

    python -m vargpt_rl.data.preferences FILE

describes one; ``pandas.read_parquet`` reads one.
"""

import argparse
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

# Bits are packed (vargpt_rl.model.bits.pack); log-probabilities are in nats, summed over a picture's bits or by
# scale over those of each; a reward is null where none was asked for; sampling is a JSON object.
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
        pa.field("rejected_seed", pa.int64(), nullable=False),
        pa.field("rejected_version", pa.int64(), nullable=False),
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


def write_table(path: Path, rows: list[dict[str, object]]) -> None:
    """Writes ``rows``, each with all of `COLUMNS`; ``path`` is either the whole new table or what it was before.

    Raises ValueError, naming the pair or column, for a repeated pair id, a reference log-probability that is not
    finite, a missing or unknown column, or a value of the wrong type.
    """
    path = Path(path)
    for row in rows:
        if row.keys() != set(COLUMNS.names):
            odd = sorted(row.keys() ^ set(COLUMNS.names))
            raise ValueError(f"{path}: pair {row.get('pair_id')!r}: missing or unknown columns: {', '.join(odd)}")
    table = pa.table([_column(path, field, rows) for field in COLUMNS], schema=COLUMNS)
    repeated = [name for name, count in Counter(row["pair_id"] for row in rows).items() if count > 1]
    if repeated:
        raise ValueError(f"{path}: {len(repeated)} pair ids occur more than once, among them {repeated[0]!r}")
    for row in rows:
        for name in REFERENCES:
            if not np.isfinite(row[name]).all():
                raise ValueError(f"{path}: pair {row['pair_id']!r}: {name} is {row[name]}, expected finite numbers")
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        pq.write_table(table, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _column(path: Path, field: pa.Field, rows: list[dict[str, object]]) -> pa.Array:
    try:
        column = pa.array([row[field.name] for row in rows], field.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise ValueError(f"{path}: column {field.name} is not of type {field.type}: {error}") from error
    if column.null_count and not field.nullable:
        raise ValueError(f"{path}: column {field.name} has {column.null_count} empty values")
    return column


def read_table(path: Path) -> pd.DataFrame:
    """A preference table with the columns of `COLUMNS`, in that order; others are left out.

    Raises ValueError, naming the file and the column, where one is missing, of the wrong type or has empty values.
    """
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from error
    for field in COLUMNS:
        if field.name not in table.column_names:
            raise ValueError(f"{path}: column {field.name} is missing")
        column = table[field.name]
        if NARROW.get(column.type, column.type) != field.type:
            raise ValueError(f"{path}: column {field.name} is of type {column.type}, expected {field.type}")
        if column.null_count and not field.nullable:
            raise ValueError(f"{path}: column {field.name} has {column.null_count} empty values")
    return table.select(COLUMNS.names).to_pandas()


def describe(table: pd.DataFrame) -> str:
    """What a preference table has, in some lines: sources, rewards, reference margins (nats), duplicates."""
    if table.empty:
        return "0 pairs"
    lines = [f"{len(table)} pairs of {table.prompt_id.nunique()} prompts"]
    for side in ("chosen", "rejected"):
        counts = table.groupby([f"{side}_source", "resolution"]).size()
        lines += [f"{side} from {source} at {side_px} px: {n}" for (source, side_px), n in counts.items()]
    scored = table.dropna(subset=["chosen_reward", "rejected_reward"])
    lines.append(f"rewards: {len(scored)} pairs scored")
    if len(scored):
        wins = (scored.chosen_reward > scored.rejected_reward).mean()
        ties = (scored.chosen_reward == scored.rejected_reward).mean()
        lines.append(
            f"reward: chosen {scored.chosen_reward.mean():.4f}, rejected {scored.rejected_reward.mean():.4f}, "
            f"chosen wins {wins:.1%}, ties {ties:.1%}"
        )
    margin = table.reference_chosen_logp - table.reference_rejected_logp
    lines.append(
        f"reference margin: mean {margin.mean():.2f}, median {margin.median():.2f}, "
        f"from {margin.min():.2f} to {margin.max():.2f}, positive {(margin > 0).mean():.1%}"
    )
    repeats = {"pair ids": ["pair_id"], "rejected pictures": ["prompt_id", "rejected_bits"]}
    lines += [f"repeated {what}: {table.duplicated(columns).sum()}" for what, columns in repeats.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Describes a preference table.")
    parser.add_argument("file", type=Path)
    try:
        print(describe(read_table(parser.parse_args().file)))
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
