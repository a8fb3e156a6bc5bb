"""Convert a published checkpoint to a model directory of this project, or back: ``python -m vargpt_rl.convert``.

``source=DIR target=DIR to=hf`` converts a release of either family (config.json of type ``vargpt_qwen2_vl`` or
``vargpt_llava``, one safetensors file or shards with an index) to a directory that ``from_pretrained`` reads;
``to=release`` converts back. An adapter's folder is merged into its base, and becomes either; with ``to=release`` the
merged model lies beside the target meanwhile. Every other tensor is copied bit by bit in its own dtype. Tensors that
the model does not use are kept in ``unused.safetensors``, and the release's config.json as ``release_config.json``; if
these are missing, as in a model trained here, converting back writes neutral tensors and a new config.json. Errors are
one line that names file and tensor; exit code 2.
"""

import enum
import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedConfig

from vargpt_rl.common.command import run_command
from vargpt_rl.model.configuration import VargptConfig
from vargpt_rl.model.families import FAMILIES, family_of, load_config
from vargpt_rl.model.v1.configuration import VargptV1Config
from vargpt_rl.release.v1_1_config import Release
from vargpt_rl.release.v1_config import V1Release
from vargpt_rl.storage.adapter import is_adapter_folder, write_merged
from vargpt_rl.storage.sharded import (
    OTHER_FILES,
    TOKENIZER_FILES,
    UNUSED,
    Stored,
    Tensors,
    about,
    check_tensors,
    copy_files,
    new_model_dir,
    read_json,
    save_sharded,
    save_together,
    stored_in,
    stored_in_folder,
)

RELEASE_CONFIG = "release_config.json"
RELEASES: dict[str, type[Release] | type[V1Release]] = {
    VargptConfig.model_type: Release,
    VargptV1Config.model_type: V1Release,
}
"""The published layout of each family, by the ``model_type`` of our configuration."""
FROM_RELEASE = {release.model_type: release for release in RELEASES.values()}


class Target(enum.Enum):
    """Format to convert to."""

    hf = "hf"
    release = "release"


@dataclass
class Conversion:
    """Settings of this command."""

    source: str
    """Folder to read."""
    target: str
    """Folder to write; must not exist, or be empty."""
    to: Target
    """hf (source is a release) or release (source is a model directory)."""


def model_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a model."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in family_of(config).model(config).state_dict().items()}


def tied(config: PreTrainedConfig) -> frozenset[str]:
    """Return the tensors that a directory may omit because they are shared with another."""
    return frozenset({"lm_head.weight"} if config.tie_word_embeddings else ())


def usual_dtype(tensors: Tensors) -> torch.dtype:
    """Return the dtype of most tensors."""
    return Counter(stored.dtype for stored in tensors.values()).most_common(1)[0][0]


def print_counts(reasons: Iterable[str]) -> None:
    """Print how often each reason applies, one per line."""
    for reason, count in Counter(reasons).items():
        print(f"{count:6} {reason}")


def _stated_type(path: Path, known: Iterable[str], where: str | None = None) -> tuple[dict, str]:
    """Read a config.json and the model type that it, or its section ``where``, states."""
    stated = read_json(path)
    found = (stated.get(where, stated) if where else stated).get("model_type")
    if not isinstance(found, str) or found not in known:
        if found in FAMILIES:
            raise ValueError(
                f"{path}: model_type is {found!r}: this is a model directory already, ready for "
                f"checkpoint={path.parent}; to=release converts it back"
            )
        raise ValueError(f"{path}: model_type is {found!r}, expected {' or '.join(map(repr, known))}")
    return stated, found


def release_to_hf(source: Path, target: Path) -> None:
    """Convert a release to a model directory."""
    tensors = stored_in_folder(source)
    shapes = {name: stored.shape for name, stored in tensors.items()}
    stated, kind = _stated_type(source / "config.json", FROM_RELEASE, "hf_config")
    with about(source):
        release = FROM_RELEASE[kind].of_released(stated, shapes, usual_dtype(tensors))
    ours = model_shapes(release.config)
    names = {release.name(name): name for name in ours}
    unused = release.left_out()
    expected = {name: ours[mine] for name, mine in names.items()} | unused
    check_tensors(tensors, expected, source, tied(release.config))

    rows = tensors[release.rows].last_rows(ours[release.our_rows])
    model = {names[name]: stored for name, stored in tensors.items() if name not in unused} | {release.our_rows: rows}
    with new_model_dir(target) as folder:
        release.config.save_pretrained(folder)
        files = save_sharded(model, folder)
        reasons = {name: release.reason(name) for name in tensors if name in unused}
        save_together({name: tensors[name] for name in reasons}, folder / UNUSED, {"reasons": json.dumps(reasons)})
        (folder / RELEASE_CONFIG).write_bytes((source / "config.json").read_bytes())
        copy_files(source, folder, TOKENIZER_FILES + OTHER_FILES)
    print(f"{len(tensors)} tensors read, {len(model)} written in {files} files; kept aside in {UNUSED}:")
    print_counts(reasons.values())


def _made_up(source: Path, release: Release | V1Release, usual: torch.dtype) -> Tensors:
    """Make neutral tensors for those that our model does not have."""
    tensors = {}
    for name, shape in release.left_out().items():
        dtype = release.dtype(name, usual)
        tensors[name] = Stored(source, name, shape, dtype, partial(release.neutral, name, dtype))
    return tensors


def hf_to_release(source: Path, target: Path) -> None:
    """Convert a model directory to the release's layout."""
    kind = _stated_type(source / "config.json", FAMILIES)[1]
    with about(source / "config.json"):
        config = load_config(source)
    model, ours = stored_in_folder(source), model_shapes(config)
    check_tensors(model, ours, source, tied(config))
    dtype = usual_dtype(model)
    known = (source / UNUSED).is_file()
    kept = stored_in(source / UNUSED) if known else {}
    release = RELEASES[kind].of_model(config, kept)
    if known:
        check_tensors(kept, release.left_out(), source / UNUSED)
    unused = kept or _made_up(source, release, dtype)

    last, rows = model[release.our_rows], unused[release.rows]

    def with_last() -> torch.Tensor:
        every, own = rows.read().to(last.dtype), last.read()
        own = own.view(-1, every.shape[1])
        every[-len(own) :] = own
        return every

    released = {release.name(name): stored for name, stored in model.items()} | unused
    released[release.rows] = replace(rows, dtype=last.dtype, read=with_last)
    with new_model_dir(target) as folder:
        if (source / RELEASE_CONFIG).is_file():
            (folder / "config.json").write_bytes((source / RELEASE_CONFIG).read_bytes())
        else:
            (folder / "config.json").write_text(json.dumps(release.stated(dtype), indent=2))
        files = save_sharded(released, folder)
        copy_files(source, folder, TOKENIZER_FILES + OTHER_FILES)
    origin = f"from {UNUSED}" if known else f"neutral, since there is no {UNUSED}"
    print(f"{len(model)} tensors read, {len(released)} written in {files} files; {len(unused)} of these {origin}:")
    print_counts(map(release.reason, unused))


def convert(command: Conversion) -> None:
    """Run one conversion."""
    source, target = Path(command.source), Path(command.target)
    if is_adapter_folder(source) and command.to is Target.hf:
        print(f"adapter and base merged: {write_merged(source, target)}")
        return
    if is_adapter_folder(source):
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-merged-") as folder:
            hf_to_release(write_merged(source, Path(folder) / "model"), target)
        return
    way = release_to_hf if command.to is Target.hf else hf_to_release
    way(source, target)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(Conversion, convert, arguments)


if __name__ == "__main__":
    sys.exit(main())
