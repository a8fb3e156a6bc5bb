"""Pairs of one's own (``preference.pairs``): encoded once for each resolution, scored by rewards and the reference.

They take the place of sampling, judging and pairing: an iteration encodes both images of each pair, and its preference
table has a row for each training pair. Held-out pairs are measured and never trained on.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from actors.worker import Failure, Worker
from rewards.preferences import PreferencePair
from vargpt_rl.common.failpoints import point
from vargpt_rl.data.own_pairs import OwnPair, OwnPairs
from vargpt_rl.data.samples import Prompt, Winner
from vargpt_rl.driver.agreement import agreements, score_sides
from vargpt_rl.driver.pairs import describe_pairs, write_scored
from vargpt_rl.driver.parts import in_parts, packed, unpacked
from vargpt_rl.driver.session import StageContext
from vargpt_rl.storage.checkpoint import Policy
from vargpt_rl.storage.files import write_atomically

COLUMNS = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),  # train or held_out
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("reply", pa.string(), nullable=False),
        pa.field("chosen", pa.string(), nullable=False),  # keys of the images
        pa.field("rejected", pa.string(), nullable=False),
        pa.field("chosen_bits", pa.binary(), nullable=False),
        pa.field("rejected_bits", pa.binary(), nullable=False),
    ]
)
LEFT_OUT = "left_out"
"""Key, in the file's metadata, of the comparisons that are no pair, by reason."""
UNREADABLE, SAME_BITS = "unreadable image", "identical bits"


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs of a split as bits, and what became of the other comparisons."""

    pairs: list[PreferencePair]
    left_out: Counter[str]


def encoded_path(context: StageContext) -> Path:
    """Return the file of the encoded pairs of a resolution."""
    return context.run.directory / "rollouts" / "pairs" / f"{context.resolution}.parquet"


def encode_own_pairs(context: StageContext, policy: Policy) -> dict:
    """Encode all images of the pairs; each image once, and only in the first iteration of a resolution."""
    own = context.inputs.pairs
    assert own is not None  # the loop asks for this step with pairs alone
    if context.index > context.session.config.resolutions.index(context.resolution):
        return {"images": 0}
    context.swap_to(policy)
    began = time.perf_counter()
    left_out = Counter(own.left_out)
    bits = _encode(context, own)
    rows = list(_rows(own, bits, left_out))
    context.inputs.check_quarantine()
    if not any(row["split"] == "train" for row in rows):
        raise ValueError(f"preference.pairs: no pair to train on; left out: {dict(left_out)}")
    schema = COLUMNS.with_metadata({LEFT_OUT: json.dumps(left_out)})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema), sink, write_page_checksum=True)
    encoded_path(context).parent.mkdir(parents=True, exist_ok=True)
    point(f"{context.name}/encoded")
    write_atomically(encoded_path(context), sink.getvalue().to_pybytes())
    seconds = time.perf_counter() - began
    context.log("encode", context.index, {"images": len(bits), "pairs": len(rows), "seconds": seconds})
    return {"images": len(bits), "pairs": len(rows), "seconds": seconds}


def _encode(context: StageContext, own: OwnPairs) -> dict[str, bytes]:
    """Return the bits of each image by key; undecodable ones are quarantined with their row and left out."""
    places = {key: pair for pair in reversed(own.pairs) for key in (pair.chosen, pair.rejected)}
    bits: dict[str, bytes] = {}
    for found in in_parts(context, "images", sorted(places), partial(_encode_part, context)):
        bits |= {key: unpacked(text) for key, text in found["bits"].items()}
        for key, reason in found["failures"].items():
            context.inputs.quarantine.add(places[key].place, places[key].prompt.text, reason)
    return bits


def _encode_part(context: StageContext, keys: list[str]) -> dict[str, dict[str, str]]:
    """Encode images; return the bits as text, and the reasons of those that cannot be read, by key."""
    found: dict[str, dict[str, str]] = {"bits": {}, "failures": {}}
    for result in context.pool.run(Worker.encode, keys, context.resolution):
        if isinstance(result, Failure):
            found["failures"][result.key] = result.reason
        else:
            found["bits"][result.key] = packed(result.bits)
    return found


def _rows(own: OwnPairs, bits: dict[str, bytes], left_out: Counter[str]) -> Iterator[dict[str, object]]:
    for split in ("train", "held_out"):
        for pair in own.split(split):
            if not (pair.chosen in bits and pair.rejected in bits):
                left_out[UNREADABLE] += 1
            elif bits[pair.chosen] == bits[pair.rejected]:
                left_out[SAME_BITS] += 1
            else:
                yield _row(split, pair, bits)


def _row(split: str, pair: OwnPair, bits: dict[str, bytes]) -> dict[str, object]:
    return {
        "pair_id": pair.id,
        "split": split,
        "prompt_id": pair.prompt.id,
        "prompt": pair.prompt.text,
        "reply": pair.prompt.reply,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "chosen_bits": bits[pair.chosen],
        "rejected_bits": bits[pair.rejected],
    }


def read_encoded(path: Path, resolution: int, split: str) -> EncodedPairs:
    """Read the pairs of a split. ValueError naming the file if it is damaged."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
        left_out = Counter(json.loads(table.schema.metadata[LEFT_OUT.encode()]))
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not encoded pairs, or damaged: {error}") from error
    return EncodedPairs([_pair(row, resolution) for row in table.to_pylist() if row["split"] == split], left_out)


def _pair(row: dict[str, str | bytes], resolution: int) -> PreferencePair:
    prompt = Prompt(str(row["prompt_id"]), str(row["prompt"]), str(row["reply"]))
    chosen, rejected = (
        Winner(prompt, bytes(row[f"{side}_bits"]), resolution, str(row[side]))  # type: ignore[arg-type]
        for side in ("chosen", "rejected")
    )
    return PreferencePair(str(row["pair_id"]), chosen, rejected, None, None)


def pair_own(context: StageContext, policy: Policy) -> dict:
    """Write the preference table of the training pairs, scored with ``policy``, which is the reference.

    Rewards and the judge score both sides; how often they agree with the pairs is part of the result.
    """
    context.swap_to(policy)
    found = read_encoded(encoded_path(context), context.resolution, "train")
    scored = score_sides(context, found.pairs)
    origin = _origin(scored.pairs, found.left_out)
    write_scored(
        context,
        context.table(),
        scored.pairs,
        context.config.dpo.recipe.micro_batch,
        origin,
        states=context.states,
        judged=scored.margins,
    )
    describe_pairs(context)
    counts = {
        "built": len(scored.pairs),
        "dropped": found.left_out.total(),
        "dropped_by_reason": dict(found.left_out),
        "prompts": len({pair.prompt.id for pair in scored.pairs}),
    }
    return counts | {"people": agreements(scored.margins), "own": True}


def write_held_out(context: StageContext) -> dict[str, int]:
    """Write the table of the held-out pairs with the weights in the workers; no table if no pair is held out."""
    found = read_encoded(encoded_path(context), context.resolution, "held_out")
    if not found.pairs:
        return {}
    origin = _origin(found.pairs, Counter())
    write_scored(context, context.table("held-out"), found.pairs, context.config.rollout.images_at_once, origin)
    return {"pairs": len(found.pairs)}


def _origin(pairs: Sequence[PreferencePair], left_out: Counter[str]) -> dict[str, object]:
    return {
        "samples": 0,
        "prompts": len({pair.prompt.id for pair in pairs}),
        "prompts_without_winner": 0,
        "dropped_by_reason": dict(left_out),
    }
