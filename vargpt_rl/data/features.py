"""Cache of the image tokenizer's features on disk, so that supervised training need not run it.

Bits would take a sixteenth of the space, but bitwise self-correction flips bits and recomputes the labels of later
scales from the features (Infinity, section 3.4). They are kept as float16 [d, h, w]: 16 KiB an image at 256 px and
d = 32, 64 KiB at 512 px.

A cache is a folder of shards ``features-*.safetensors``. A shard is written atomically, never changed, and named after
its keys, so any number of processes may write to one folder. It holds ``features`` [n, d, h, w], ``keys`` uint8 [n, 36]
(sha256 of the image file, or of an image's key in a data source; number of the crop as four bytes, highest first) and
``checks`` uint32 [n] (crc32 of each image's features). Its metadata name the image tokenizer, by its checksum, and the
resolution; a blake2b there guards keys, checks, and the type and shape of the features.

Shape legend: n images of a shard, d bits a token, h w latent grid.
"""

import shutil
import zlib
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vargpt_rl.model.families import AnyImageTokenizer, family_of, load_config
from vargpt_rl.model.scales import STRIDE
from vargpt_rl.storage.files import write_atomically
from vargpt_rl.storage.sharded import check_tensors, stored_in_folder

FORMAT = "1"
SHARD = 1 << 26
"""Bytes of features in a full shard: 4096 images at 256 px."""
_KEY = 36
_PLACE = np.dtype([("shard", np.int32), ("row", np.int32), ("check", np.uint32)])


def tokenizer_checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hexadecimal blake2b of an image tokenizer, from its ``state_dict``: names in order, shapes, float32 values.

    Stored precision does not matter if the values are the same.
    """
    digest = blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].detach().to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def shard_files(folder: Path) -> list[Path]:
    """Return the shards of a cache, in order; none if there is no such folder."""
    return sorted(Path(folder).glob("features-*.safetensors"))


def _key(content_sha256: str, crop: int) -> bytes:
    """ValueError for what is not a sha256 in hexadecimal digits."""
    digest = bytes.fromhex(content_sha256)
    if len(digest) + 4 != _KEY:
        raise ValueError(f"{content_sha256!r} is not a sha256")
    return digest + crop.to_bytes(4, "big")


def _guard(keys: np.ndarray, checks: np.ndarray, features: str) -> str:
    return blake2b(keys.tobytes() + checks.tobytes() + features.encode(), digest_size=16).hexdigest()


class _Index(NamedTuple):
    """Keys uint8 [n, 36] and checks uint32 [n] of a shard."""

    keys: np.ndarray
    checks: np.ndarray


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: torn or damaged shard of features ({error}): delete it and encode again") from error


def _read_index(path: Path, tokenizer: str, resolution: int) -> _Index:
    """Read a shard's index. ValueError, naming the file, if it is damaged or of another tokenizer or resolution."""
    with _opened(path) as file:
        about = file.metadata() or {}
        if about.get("format") != FORMAT:
            raise ValueError(f"{path}: format {about.get('format')} of features, expected {FORMAT}")
        if (about.get("image_tokenizer"), about.get("resolution")) != (tokenizer, str(resolution)):
            raise ValueError(
                f"{path}: features of image tokenizer {about.get('image_tokenizer')} at {about.get('resolution')} px, "
                f"expected those of {tokenizer} at {resolution} px"
            )
        index = _Index(file.get_tensor("keys"), file.get_tensor("checks"))
        header = file.get_slice("features")
        features = f"{header.get_dtype()} {header.get_shape()}"
    if about.get("guard") != _guard(*index, features):
        raise ValueError(
            f"{path}: torn or damaged shard of features (its keys or header changed): delete it and encode again"
        )
    return index


class FeatureCache(Container):
    """Random access to a cache: reads one image's features at a time, and holds 48 bytes for each image there is.

    A shard is opened for each access (some 60 microseconds), so that copies in other processes need no care. Raises
    ValueError where there are no shards, or one is damaged or of another image tokenizer or resolution.
    """

    def __init__(self, folder: Path, tokenizer_checksum: str, resolution: int):
        self.files = shard_files(folder)
        if not self.files:
            raise ValueError(f"{folder}: no shards of features in it, expected those of vargpt_rl.data.encode")
        indices = [_read_index(path, tokenizer_checksum, resolution) for path in self.files]
        keys = np.concatenate([index.keys for index in indices])
        places = np.empty(len(keys), _PLACE)
        places["shard"] = np.repeat(np.arange(len(indices)), [len(index.keys) for index in indices])
        places["row"] = np.concatenate([np.arange(len(index.keys)) for index in indices])
        places["check"] = np.concatenate([index.checks for index in indices])
        self.crops = 1 + int(keys[:, -4:].copy().view(">u4").max())
        """Upper bound of the crop numbers."""
        # Processes that met the same image each wrote it; the first of them is taken.
        self._keys, first = np.unique(keys.view(f"S{_KEY}")[:, 0], return_index=True)
        self._places = places[first]

    def __len__(self) -> int:
        """Crops of images in the cache."""
        return len(self._keys)

    def __contains__(self, item: tuple[str, int]) -> bool:  # type: ignore[override]  # Container has it for any object
        return self._find(*item) is not None

    def _find(self, content_sha256: str, crop: int) -> np.void | None:
        wanted = np.array([_key(content_sha256, crop)], self._keys.dtype)
        at = int(np.searchsorted(self._keys, wanted)[0])
        # Compared as arrays: numpy's scalars lose the zero bytes at their end.
        return self._places[at] if (self._keys[at : at + 1] == wanted).any() else None

    def get(self, content_sha256: str, crop: int) -> np.ndarray | None:
        """Return float16 [d, h, w] of the crop with this number of the image file with this sha256; None if not there.

        ValueError, naming the shard, if it was damaged since it was written.
        """
        place = self._find(content_sha256, crop)
        if place is None:
            return None
        path, row = self.files[place["shard"]], int(place["row"])
        with _opened(path) as file:
            features_dhw = file.get_slice("features")[row : row + 1][0]
        if zlib.crc32(features_dhw) != place["check"]:
            raise ValueError(f"{path}: the features of {content_sha256}, crop {crop}, are damaged: encode again")
        return features_dhw


def drop_damaged(folder: Path, tokenizer_checksum: str, resolution: int) -> list[str]:
    """Delete the shards of a cache that are not as they were written; return what is wrong with each."""
    told = []
    for path in shard_files(folder):
        try:
            checks = _read_index(path, tokenizer_checksum, resolution).checks
            with _opened(path) as file:
                features = file.get_slice("features")
                for row, check in enumerate(checks):
                    if zlib.crc32(features[row : row + 1][0]) != check:
                        raise ValueError(f"{path}: the features of image {row} are damaged")
        except (ValueError, OSError) as error:
            told.append(str(error))
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return told


class FeatureWriter:
    """Add shards to a cache. Features that do not fill a shard are held until the ``with`` block ends."""

    def __init__(self, folder: Path, tokenizer_checksum: str, resolution: int, shard: int = SHARD):
        self.folder, self.shard, self.grid = Path(folder), shard, resolution // STRIDE
        self._about = {"format": FORMAT, "image_tokenizer": tokenizer_checksum, "resolution": str(resolution)}
        self._keys: list[bytes] = []
        self._features: list[np.ndarray] = []

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(self, *fault) -> None:
        self.flush()  # after an error too: what was added is complete

    def add(self, content_sha256: str, crop: int, features_dhw: np.ndarray) -> None:
        """Add the features float16 [d, h, w] of a crop that is not in the cache yet.

        ValueError for another dtype or grid, and for values that are not finite.
        """
        if features_dhw.dtype != np.float16 or features_dhw.shape[1:] != (self.grid, self.grid):
            expected = f"float16 of {self.grid} x {self.grid}"
            raise ValueError(f"features are {features_dhw.dtype} {features_dhw.shape}, expected {expected}")
        if not np.isfinite(features_dhw).all():
            raise ValueError(f"features of {content_sha256}, crop {crop}, are not finite in float16")
        self._keys.append(_key(content_sha256, crop))
        self._features.append(features_dhw)
        if (len(self._keys) + 1) * features_dhw.nbytes > self.shard:
            self.flush()

    def flush(self) -> None:
        """Write the held features as a shard, atomically."""
        if not self._keys:
            return
        features = np.ascontiguousarray(np.stack(self._features))
        keys = np.frombuffer(b"".join(self._keys), np.uint8).reshape(-1, _KEY)
        checks = np.array([zlib.crc32(features_dhw) for features_dhw in features], np.uint32)
        guard = _guard(keys, checks, f"F16 {list(features.shape)}")
        data = save({"features": features, "keys": keys, "checks": checks}, self._about | {"guard": guard})
        name = blake2b(keys.tobytes(), digest_size=8).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / f"features-{name}.safetensors", data)
        self._keys, self._features = [], []


def load_image_tokenizer(folder: Path) -> AnyImageTokenizer:
    """Load the image tokenizer of a model directory, float32; read nothing else. ValueError if a tensor is wrong."""
    prefix = "image_tokenizer."
    config = load_config(folder)
    tokenizer = family_of(config).image_tokenizer(config.image_tokenizer_config).eval()
    stored = {name: one for name, one in stored_in_folder(folder).items() if name.startswith(prefix)}
    check_tensors(stored, {f"{prefix}{name}": tuple(t.shape) for name, t in tokenizer.state_dict().items()}, folder)
    tokenizer.load_state_dict({name.removeprefix(prefix): one.read() for name, one in stored.items()})
    return tokenizer
