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
from vargpt_rl.model.prompt import ImageToDraw, ShownImage
from vargpt_rl.model.unified import Unified

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
DEEPEST = 1000
"""Most layers, blocks or levels that a configuration may ask for: each of them is built."""
LARGEST = 2**31
"""Larger sizes are no tensor's."""
COUNTS = {"depth", "num_hidden_layers", "blocks_per_level", "max_scales", "num_channels", "layers"}
"""Keys of config.json that say how many modules there are."""

SPECIAL = ("image_token_id", "image_gen_start_token_id", "image_gen_pad_token_id", "image_gen_end_token_id")
"""Keys of config.json for tokens that stand for images, and so are no words."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of safetensors that weights are loaded from. Those of 8 bits mean nothing without their scales."""

Shapes = dict[str, tuple[int, ...]]


def check_whole(folder: Path) -> PreTrainedConfig:
    """Return the configuration of a model directory whose tensors are those that it asks for.

    ValueError, naming the file or tensor, for absurd sizes, weights that are missing, cut off or no safetensors (such
    as a git-lfs pointer), tensors that are missing, surplus, misshapen or of another type, and a tokenizer with more
    words than embeddings or without the tokens of images.
    """
    settings = folder / "config.json"
    config = check_config(folder)
    try:
        expected = _shapes(config)
    except Exception as error:  # libraries raise errors of many kinds on odd sizes and types
        raise ValueError(
            f"{settings}: no model can be built of it: {type(error).__name__}: {first_line(error)}"
        ) from error
    _check_tokens(folder, config)
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
    return config


def _check_tokens(folder: Path, config: PreTrainedConfig) -> None:
    """ValueError for a tokenizer that cannot be loaded, or gives tokens that the model has not."""
    try:
        chat = markup_for(folder, config)
        ids = chat.encode([("user", [ShownImage(1), "a"]), ("assistant", ["b", ImageToDraw(1)])]).ids
    except Exception as error:  # libraries raise errors of many kinds on odd files
        raise ValueError(f"{folder}: its tokenizer cannot be loaded: {first_line(error)}") from error
    for key in SPECIAL:
        if getattr(config, key) not in chat.tokenizer.added_tokens_decoder:
            raise ValueError(
                f"{folder / 'config.json'}: {key} is {getattr(config, key)}, which is no special token of its tokenizer"
            )
    words, rows = len(chat.tokenizer), config.get_text_config().vocab_size
    if words > rows:
        raise ValueError(f"{folder}: the tokenizer has {words} tokens, but the model has embeddings of {rows}")
    for token in (*ids, chat.tokenizer.pad_token_id):
        if not isinstance(token, int) or not 0 <= token < rows:
            raise ValueError(f"{folder}: its tokenizer gives token {token}, expected 0 to {rows - 1}")


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
        if not abs(value) <= limit:  # NaN, which JSON's readers take, compares to nothing
            raise ValueError(f"{settings}: {key} is {value}, expected at most {limit}")
    if found.get("quantization_config"):
        raise ValueError(f"{settings}: quantization_config is set, expected weights that are not quantised")
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
    """Return the files of a model's weights: one, if it is there, else those of an index, as transformers does.

    ValueError if one is missing, or an index names one elsewhere.
    """
    index = folder / INDEX
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not index.exists():
        raise ValueError(f"{folder}: there is neither {WEIGHTS} nor {INDEX}")
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
    """Return the tensors' shapes.

    ValueError, naming the file, if it is cut off or no safetensors file, or a tensor is not of floating point.
    """
    with file.open("rb") as opened:
        head = opened.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file}: a git-lfs pointer, expected the file that `git lfs pull` fetches")
    try:
        with safe_open(file, "pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118  # no dictionary
            shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
            types = {name: each.get_dtype() for name, each in slices.items()}
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            json.loads(opened.read(size), object_pairs_hook=_without_repetition)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file}: no whole safetensors file: {first_line(error)}") from error
    for name, kind in types.items():
        if kind not in FLOATS:
            raise ValueError(f"{file}: tensor {name} is of type {kind}, expected one of {', '.join(FLOATS)}")
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


def _numbers(value: object, key: str) -> Iterator[tuple[str, float]]:
    """Yield the numbers in ``value`` with their keys. ValueError for a list that is too long to be built."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        if len(value) > DEEPEST * 10:
            raise ValueError(f"{key} has {len(value)} items, expected at most {DEEPEST * 10}")
        for item in value:
            yield from _numbers(item, f"{key}[]")
    elif isinstance(value, int | float):
        yield key, value
