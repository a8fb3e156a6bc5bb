"""The published checkpoint as a model directory of this project, and back: ``python -m vargpt_rl.convert``.

``source=DIR target=DIR to=hf`` turns a release (config.json of type ``vargpt_qwen2_vl``, one safetensors file or shards
with an index) into a directory that ``Vargpt.from_pretrained`` reads; ``to=release`` is the way back. Every tensor is
carried over bit by bit in its own type. What this model has no place for is kept aside in ``unused.safetensors``, and
the release's config.json as ``release_config.json``; where these are missing, as in a model that was trained here, the
way back writes neutral tensors and a new config.json. A fault is one line that names file and tensor; exit code 2.
"""

import enum
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from configs.command import run_command
from vargpt_rl.model.configuration import VargptConfig
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.release import (
    START,
    START_ROWS,
    dropped_shapes,
    neutral,
    our_name,
    reason_dropped,
    release_name,
    start_rows_shape,
)
from vargpt_rl.model.release_config import Sizes, from_release_config, sizes_of, to_release_config
from vargpt_rl.shards import (
    OTHER_FILES,
    TOKENIZER_FILES,
    UNUSED,
    Stored,
    Tensors,
    about,
    appearing,
    check_tensors,
    copy_files,
    read_json,
    save_sharded,
    save_together,
    stored_in,
    stored_in_folder,
)

RELEASE_CONFIG = "release_config.json"
RELEASE_CHUNKS = 8
START_ROWS_REASON = "only the row of image_gen_start is ever read"


class Layout(enum.Enum):
    hf = "hf"
    release = "release"


@dataclass
class Conversion:
    """``to``: hf (from a release) or release (from a model directory)."""

    source: str
    target: str
    to: Layout


def model_shapes(config: VargptConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Vargpt(config).state_dict().items()}


def tied(config: VargptConfig) -> frozenset[str]:
    """What a directory need not hold, for it is another tensor."""
    return frozenset({"lm_head.weight"} if config.tie_word_embeddings else ())


def usual_dtype(tensors: Tensors) -> torch.dtype:
    """The type of most tensors."""
    return Counter(stored.dtype for stored in tensors.values()).most_common(1)[0][0]


def reason_unused(name: str) -> str:
    """Why a released tensor, or a part of it, is kept aside."""
    return START_ROWS_REASON if name == START_ROWS else reason_dropped(name)


def print_counts(reasons: Iterable[str]) -> None:
    """How often each reason applies, one a line."""
    for reason, count in Counter(reasons).items():
        print(f"{count:6} {reason}")


def release_to_hf(source: Path, target: Path) -> None:
    """Write ``target``, a model directory, from a release."""
    tensors = stored_in_folder(source)
    shapes = {name: stored.shape for name, stored in tensors.items()}
    stated = read_json(source / "config.json")
    with about(source):
        config, blocks_per_chunk = from_release_config(stated, shapes, usual_dtype(tensors))
    sizes = sizes_of(config, blocks_per_chunk)
    expected = {release_name(name, *sizes): shape for name, shape in model_shapes(config).items()}
    expected |= dropped_shapes(config, blocks_per_chunk) | {START_ROWS: start_rows_shape(config)}
    check_tensors(tensors, expected, source, tied(config))

    names = {name: our_name(name, *sizes) for name in tensors}
    model = {ours: tensors[name] for name, ours in names.items() if ours}
    model[START] = tensors[START_ROWS].last_row()
    unused = {name: tensors[name] for name, ours in names.items() if ours in (None, START)}
    with appearing(target) as folder:
        config.save_pretrained(folder)
        files = save_sharded(model, folder)
        reasons = {name: reason_unused(name) for name in unused}
        save_together(unused, folder / UNUSED, {"reasons": json.dumps(reasons)})
        (folder / RELEASE_CONFIG).write_bytes((source / "config.json").read_bytes())
        copy_files(source, folder, TOKENIZER_FILES + OTHER_FILES)
    print(f"{len(tensors)} tensors read, {len(model)} written in {files} files; kept aside in {UNUSED}:")
    print_counts(reasons.values())


def _kept_aside(source: Path, config: VargptConfig) -> tuple[Tensors, Sizes]:
    """The tensors that this model has no place for, from the sidecar, and how its blocks are chunked."""
    tensors = stored_in(source / UNUSED)
    modules = {re.sub(r"^vargpt_gen\.block_chunks\.\d+\.module\.(\d+)\..*", r"\1", name) for name in tensors}
    blocks_per_chunk = max(1, sum(map(str.isdecimal, modules)))
    expected = dropped_shapes(config, blocks_per_chunk) | {START_ROWS: start_rows_shape(config)}
    check_tensors(tensors, expected, source / UNUSED)
    return tensors, sizes_of(config, blocks_per_chunk)


def _made_up(source: Path, config: VargptConfig, dtype: torch.dtype) -> tuple[Tensors, Sizes]:
    """Neutral ones instead, and the release's number of chunks as far as the depth allows it."""
    blocks_per_chunk = config.decoder_config.depth // math.gcd(config.decoder_config.depth, RELEASE_CHUNKS)
    shapes = dropped_shapes(config, blocks_per_chunk) | {START_ROWS: start_rows_shape(config)}
    tensors = {}
    for name, shape in shapes.items():
        kind = torch.int64 if name.endswith("lfq.mask") else dtype
        tensors[name] = Stored(source, name, shape, kind, partial(neutral, name, shape, kind))
    return tensors, sizes_of(config, blocks_per_chunk)


def hf_to_release(source: Path, target: Path) -> None:
    """Write ``target``, a directory in the release's layout, from a model directory."""
    found = read_json(source / "config.json").get("model_type")
    if found != VargptConfig.model_type:
        raise ValueError(f"{source / 'config.json'}: model_type is {found!r}, expected {VargptConfig.model_type!r}")
    with about(source / "config.json"):
        config = VargptConfig.from_pretrained(source)
    model = stored_in_folder(source)
    check_tensors(model, model_shapes(config), source, tied(config))
    dtype = usual_dtype(model)
    known = (source / UNUSED).is_file()
    unused, sizes = _kept_aside(source, config) if known else _made_up(source, config, dtype)

    start, rows = model[START], unused[START_ROWS]

    def with_start() -> torch.Tensor:
        every = rows.read().to(start.dtype)
        every[-1] = start.read()
        return every

    release = {release_name(name, *sizes): stored for name, stored in model.items()} | unused
    release[START_ROWS] = replace(rows, dtype=start.dtype, read=with_start)
    with appearing(target) as folder:
        if (source / RELEASE_CONFIG).is_file():
            (folder / "config.json").write_bytes((source / RELEASE_CONFIG).read_bytes())
        else:
            settings = to_release_config(config, dtype)
            (folder / "config.json").write_text(json.dumps(settings, indent=2))
        files = save_sharded(release, folder)
        copy_files(source, folder, TOKENIZER_FILES + OTHER_FILES)
    origin = f"from {UNUSED}" if known else f"made up, neutral, for there is no {UNUSED}"
    print(f"{len(model)} tensors read, {len(release)} written in {files} files; {len(unused)} of these {origin}:")
    print_counts(map(reason_unused, unused))


def convert(command: Conversion) -> None:
    """Run one conversion."""
    way = release_to_hf if command.to is Layout.hf else hf_to_release
    way(Path(command.source), Path(command.target))


if __name__ == "__main__":
    sys.exit(run_command(Conversion, convert))
