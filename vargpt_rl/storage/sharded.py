"""Read, check and write model directories tensor by tensor.

Memory: one shard at a time, which is one tensor or at most ``SHARD`` bytes. Shards are small because the allocator may
keep freed tensors below about 32 MiB. Tensors are read with ``pread``, since pages of a mapped file stay resident while
it is open.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vargpt_rl.storage.files import atomic_dir

SHARD = 1 << 28
UNUSED = "unused.safetensors"
"""Tensors that a conversion sets aside for converting back; not weights of the model."""
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
"""Files of a text tokenizer in a model directory."""
OTHER_FILES = (
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
"""Files of a model directory beside configuration, weights and tokenizer."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}


@dataclass(frozen=True)
class Stored:
    """A tensor that ``read`` loads on demand. ``file`` and ``name`` locate it for error messages."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def last_rows(self, shape: tuple[int, ...]) -> "Stored":
        """Refer to the last rows of a tensor in a safetensors file, reshaped to ``shape``; only they are read."""
        rows = math.prod(shape) // math.prod(self.shape[1:])

        def read() -> torch.Tensor:
            with _opened(self.file) as file:
                return file.get_slice(self.name)[self.shape[0] - rows :].view(shape)

        return Stored(self.file, self.name, shape, self.dtype, read)


Tensors = dict[str, Stored]


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises ValueError naming the file if it is missing or not an object."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with about(path):
        value = json.loads(path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Prefix ValueErrors and configuration errors of the block with this file or folder."""
    try:
        yield
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"{path}: {error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error


def stored_in(path: Path) -> Tensors:
    """List the tensors of a safetensors file."""

    def read(name: str) -> torch.Tensor:
        with _opened(path) as file:
            return file.get_tensor(name)

    tensors = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            header = file.get_slice(name)
            if header.get_dtype() not in _DTYPES:
                raise ValueError(f"{path}: {name} is {header.get_dtype()}, expected one of {', '.join(_DTYPES)}")
            dtype = _DTYPES[header.get_dtype()]
            tensors[name] = Stored(path, name, tuple(header.get_shape()), dtype, partial(read, name))
    if not tensors:
        raise ValueError(f"{path}: contains no tensors")
    return tensors


def _single_file(folder: Path) -> Path:
    for name in ("model.safetensors", "weights.safetensors"):
        if (folder / name).is_file():
            return folder / name
    files = [path for path in folder.glob("*.safetensors") if path.name != UNUSED]
    if len(files) != 1:
        raise ValueError(f"{folder}: expected {INDEX} or one safetensors file, got {len(files)} files")
    return files[0]


def stored_in_folder(folder: Path) -> Tensors:
    """List the weights of a model directory, sharded or in one file, without those in ``UNUSED``."""
    if not (folder / INDEX).is_file():
        return stored_in(_single_file(folder))
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict):
        raise ValueError(f"{folder / INDEX}: weight_map is missing")
    tensors: Tensors = {}
    for name in sorted(set(map(str, listed.values()))):
        if Path(name).name != name:
            raise ValueError(f"{folder / INDEX}: {name}: expected the name of a file in the same folder")
        for key, stored in stored_in(folder / name).items():
            if key in tensors:
                raise ValueError(f"{stored.file}: {key} is also in {tensors[key].file.name}")
            tensors[key] = stored
    for key, name in listed.items():
        if key not in tensors or tensors[key].file.name != name:
            raise ValueError(f"{folder / name}: {key} is missing, although {INDEX} lists it")
    return tensors


def renamed(tensors: Tensors, rename: Callable[[str], str]) -> Tensors:
    """Rename tensors. Raises ValueError if two get the same name."""
    result: Tensors = {}
    for name, stored in tensors.items():
        new = rename(name)
        if new in result:
            raise ValueError(f"{stored.file}: {stored.name} and {result[new].name} are the same tensor, expected one")
        result[new] = stored
    return result


def check_tensors(
    found: Tensors, expected: dict[str, tuple[int, ...]], where: Path, optional: frozenset[str] = frozenset()
) -> None:
    """Raise ValueError naming tensor and file unless exactly the expected tensors exist, in their shapes."""
    faults = [
        f"{stored.file}: {stored.name} has shape {list(stored.shape)}, expected {list(expected[name])}"
        if name in expected
        else f"{stored.file}: {stored.name} is unexpected, this model has no such tensor"
        for name, stored in found.items()
        if expected.get(name) != stored.shape
    ]
    faults += [
        f"{where}: {name} is missing, expected shape {list(shape)}"
        for name, shape in expected.items()
        if name not in found and name not in optional
    ]
    if faults:
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise ValueError(faults[0] + more)


def save_together(tensors: Tensors, path: Path, metadata: dict[str, str]) -> None:
    """Write one file, holding all its tensors in memory."""
    try:
        save_file({name: stored.read() for name, stored in tensors.items()}, path, {"format": "pt"} | metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def save_sharded(tensors: Tensors, folder: Path) -> int:
    """Write shards, in order, and their index; return the number of shards."""
    shards: list[Tensors] = []
    room = -1
    for name, stored in tensors.items():
        if stored.nbytes > room:
            shards.append({})
            room = SHARD
        shards[-1][name] = stored
        room -= stored.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        path = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_together(shard, path, {})
        weight_map |= dict.fromkeys(shard, path.name)
    size = sum(stored.nbytes for stored in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
    return len(shards)


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy those of the files that are there."""
    for path in filter(Path.is_file, map(source.joinpath, names)):
        shutil.copyfile(path, target / path.name)


@contextmanager
def new_model_dir(target: Path) -> Iterator[Path]:
    """Yield a folder that becomes ``target`` when the block succeeds and is removed otherwise.

    Raises ValueError if ``target`` exists and is not an empty folder.
    """
    target = target.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"target={target}: expected a folder that is empty or does not exist yet")
    with atomic_dir(target) as folder:
        yield folder
