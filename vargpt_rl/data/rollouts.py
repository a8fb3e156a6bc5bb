"""Samples of an iteration on disk: a Parquet file with a row for each image, drawn by a policy or by a stronger system.

They are written once they have been generated, so that an interrupted run does not repeat them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vargpt_rl.data.samples import Prompt, Sample, Winner
from vargpt_rl.storage.files import write_atomically

COLUMNS = pa.schema(
    [
        pa.field("kind", pa.string(), nullable=False),  # sample or winner
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("reply", pa.string(), nullable=False),
        pa.field("bits", pa.binary(), nullable=False),
        pa.field("resolution", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # a checkpoint, or the winner's key
        pa.field("seed", pa.int64()),  # null, like all that follows, for winners
        pa.field("version", pa.int64()),
        pa.field("sampling", pa.string()),  # a JSON object
    ]
)


@dataclass(frozen=True)
class Rollouts:
    """Samples of policies, and the stronger system's images of the same prompts by prompt id."""

    samples: list[Sample]
    winners: dict[str, Winner]

    @property
    def images(self) -> list[tuple[Prompt, bytes]]:
        """All images as prompt and packed bits: samples, then winners."""
        images: list[Sample | Winner] = [*self.samples, *self.winners.values()]
        return [(image.prompt, image.bits) for image in images]

    @property
    def prompts(self) -> list[Prompt]:
        """The different prompts of the samples, in order."""
        return list({sample.prompt.id: sample.prompt for sample in self.samples}.values())


def write_rollouts(path: Path, rollouts: Rollouts) -> None:
    """Write samples and winners, all or nothing."""
    rows = [
        _row("sample", s, s.checkpoint, s.seed, s.version, json.dumps(s.sampling, sort_keys=True))
        for s in rollouts.samples
    ]
    rows += [_row("winner", w, w.source, None, None, None) for w in rollouts.winners.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, COLUMNS), sink, write_page_checksum=True)
    write_atomically(path, sink.getvalue().to_pybytes())


def _row(
    kind: str, image: Sample | Winner, source: str, seed: int | None, version: int | None, sampling: str | None
) -> dict:
    return {
        "kind": kind,
        "prompt_id": image.prompt.id,
        "prompt": image.prompt.text,
        "reply": image.prompt.reply,
        "bits": image.bits,
        "resolution": image.resolution,
        "source": source,
        "seed": seed,
        "version": version,
        "sampling": sampling,
    }


def read_rollouts(path: Path) -> Rollouts:
    """Read samples and winners. ValueError naming the file if it is damaged or not one of these."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file, or damaged: {error}") from error
    if not table.schema.equals(COLUMNS):
        raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS.names)}")
    samples: list[Sample] = []
    winners: dict[str, Winner] = {}
    for row in table.to_pylist():
        prompt = Prompt(row["prompt_id"], row["prompt"], row["reply"])
        if row["kind"] == "winner":
            winners[prompt.id] = Winner(prompt, row["bits"], row["resolution"], row["source"])
        else:
            sampling = json.loads(row["sampling"])
            samples.append(
                Sample(
                    prompt=prompt,
                    bits=row["bits"],
                    resolution=row["resolution"],
                    seed=row["seed"],
                    sampling=sampling,
                    version=row["version"],
                    checkpoint=row["source"],
                )
            )
    return Rollouts(samples, winners)
