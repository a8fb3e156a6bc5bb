"""Check that a model directory is whole before anything is built of it: sizes, tensors, values and vocabulary.

Only headers are read, except for the check of values.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from vargpt_rl.common.errors import first_line
from vargpt_rl.model.families import family_named, family_of, load_config, markup_for
from vargpt_rl.model.unified import Unified

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
DEEPEST = 1000
"""Most layers, blocks or levels that a configuration may ask for: each of them is built."""
LARGEST = 2**31
"""Larger sizes are no tensor's."""
COUNTS = {"depth", "num_hidden_layers", "blocks_per_level", "max_scales", "num_channels", "layers"}
"""Keys of config.json that say how many modules there are."""

Shapes = dict[str, tuple[int, ...]]


def check_whole(folder: Path) -> PreTrainedConfig:
    """Return the configuration of a model directory whose tensors are those that it asks for.

    ValueError, naming the file or tensor, for absurd sizes, weights that are missing, cut off or no safetensors (such
    as a git-lfs pointer), missing, surplus and misshapen tensors, and a tokenizer with more words than embeddings.
    """
    settings = folder / "config.json"
    config = check_config(folder)
    try:
        expected = _shapes(config)
    except Exception as error:  # libraries raise errors of many kinds on odd sizes and types
        raise ValueError(
            f"{settings}: no model can be built of it: {type(error).__name__}: {first_line(error)}"
        ) from error
    try:
        words = len(markup_for(folder, config).tokenizer)
    except Exception as error:  # as above, of tokenizer files
        raise ValueError(f"{folder}: its tokenizer cannot be loaded: {first_line(error)}") from error
    found: Shapes = {}
    for file in weight_files(folder):
        for name, shape in _header(file).items():
            if name in found:
                raise ValueError(f"{file}: tensor {name} is in another file of the model too")
            if name not in expected:
                raise ValueError(f"{file}: tensor {name} is not part of the model that {settings.name} describes")
            if shape != expected[name]:
                raise ValueError(f"{file}: tensor {name} has shape {list(shape)}, expected {list(expected[name])}")
            found[name] = shape
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, among them {missing[0]}")
    rows = config.get_text_config().vocab_size
    if words > rows:
        raise ValueError(f"{folder}: the tokenizer has {words} tokens, but the model has embeddings of {rows}")
    return config


def check_config(folder: Path) -> PreTrainedConfig:
    """Return the configuration of a model directory of either family. ValueError for another one, or absurd sizes."""
    settings = folder / "config.json"
    try:
        found = json.loads(settings.read_text())
        numbers = list(_numbers(found, ""))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{settings}: {first_line(error)}") from error
    family_named(str(found.get("model_type")) if isinstance(found, dict) else "")
    for key, value in numbers:
        limit = DEEPEST if key.rpartition(".")[2].rstrip("[]") in COUNTS else LARGEST
        if abs(value) > limit:
            raise ValueError(f"{settings}: {key} is {value}, expected at most {limit}")
    try:
        return load_config(folder)
    except Exception as error:  # libraries raise errors of many kinds on odd sizes and types
        raise ValueError(
            f"{settings}: no model can be built of it: {type(error).__name__}: {first_line(error)}"
        ) from error


def check_values(folder: Path) -> None:
    """Read all weights of a whole model. ValueError, naming file and tensor, for one that is not finite."""
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
            for name in names:
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and not _is_finite(tensor):
                    raise ValueError(f"{file}: tensor {name} has values that are not finite")


def _is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all values are finite. Their sum is a quick look; only one that is not is looked at by value."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32)) or torch.isfinite(tensor).all())


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a model's weights. ValueError if one is missing, or an index names one elsewhere."""
    index = folder / INDEX
    if not index.exists():
        if not (folder / WEIGHTS).is_file():
            raise ValueError(f"{folder}: there is neither {WEIGHTS} nor {INDEX}")
        return [folder / WEIGHTS]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: expected an index of shards: {first_line(error)}") from error
    for name, file in zip(names, files, strict=True):
        if Path(name).name != name:
            raise ValueError(f"{index}: shard {name} leaves the model's folder")
        if not file.is_file():
            raise ValueError(f"{file}: this shard is missing")
    return files


def _header(file: Path) -> Shapes:
    """Return the tensors' shapes. ValueError, naming the file, if it is cut off or no safetensors file."""
    with file.open("rb") as opened:
        head = opened.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file}: a git-lfs pointer, expected the file that `git lfs pull` fetches")
    try:
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
            shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            json.loads(opened.read(size), object_pairs_hook=_without_repetition)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file}: no whole safetensors file: {first_line(error)}") from error
    return shapes


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return found


def _shapes(config: PreTrainedConfig) -> Shapes:
    """Return the shapes of all tensors that a model of this configuration saves."""
    with torch.device("meta"):
        model: Unified = family_of(config).model(config)
    tied = model.all_tied_weights_keys
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}


def _numbers(value: object, key: str) -> Iterator[tuple[str, int]]:
    """Yield the whole numbers in ``value`` with their keys. ValueError for a list that is too long to be built."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        if len(value) > DEEPEST * 10:
            raise ValueError(f"{key} has {len(value)} items, expected at most {DEEPEST * 10}")
        for item in value:
            yield from _numbers(item, f"{key}[]")
    elif isinstance(value, int):
        yield key, value
