"""Images of records: references that travel instead of pixels, and their decoding."""

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from vargpt_rl.data.images import MAX_BYTES, MAX_PIXELS, ImageSource, RefusedImage, decode, open_plain
from vargpt_rl.data.quarantine import BadRecord


@dataclass(frozen=True)
class OnDisk:
    """A file below the folder ``root``. Made by `on_disk`, which keeps it there."""

    root: Path
    name: str

    def open(self) -> io.BufferedReader:
        return open_plain(self.root / self.name)


@dataclass(frozen=True)
class InRecord:
    """An encoded image that came with its record."""

    data: bytes

    def open(self) -> io.BytesIO:
        return io.BytesIO(self.data)


@dataclass(frozen=True)
class InArchive:
    """A member of an uncompressed tar: ``size`` bytes at ``offset``."""

    archive: Path
    offset: int
    size: int

    def open(self) -> io.BytesIO:
        if self.size > MAX_BYTES:
            raise RefusedImage(f"image file of more than {MAX_BYTES} bytes")
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))


@dataclass(frozen=True)
class InSource:
    """The image of ``key`` in a data source, loaded ``side`` pixels wide and high."""

    source: ImageSource
    key: str
    side: int


ImageRef = OnDisk | InRecord | InArchive | InSource


def on_disk(root: Path, name: str) -> OnDisk:
    """Refer to the image ``name`` below ``root``. BadRecord for a name that leads out of it; links are followed.

    Backslashes, as Windows writes them, separate folders unless a file has them in its name.
    """
    if "\\" in name and not os.path.isfile(root / name):
        name = name.replace("\\", "/")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise BadRecord("image path leaves its folder")
    return OnDisk(root, str(path))


def load(reference: ImageRef, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image: RGB, upright, transparency laid on white. BadRecord if it is unreadable."""
    if isinstance(reference, InSource):
        try:
            return reference.source.load(reference.key, reference.side)
        except ValueError as error:
            raise BadRecord(str(error)) from error
    try:
        with reference.open() as file:
            return decode(file, max_pixels)
    except Exception as error:  # Pillow's decoders raise errors of many kinds on broken files
        raise _bad(error) from error


def content_sha256(reference: ImageRef) -> str:
    """Return the hexadecimal sha256 of the encoded image, or of its key in a source. BadRecord if it is unreadable.

    The image is not decoded.
    """
    if isinstance(reference, InSource):
        return key_sha256(reference.key)
    try:
        with reference.open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise _bad(error) from error


def _bad(error: Exception) -> BadRecord:
    """Return the reason of a failed reading, without the file's name."""
    if isinstance(error, FileNotFoundError):
        return BadRecord("image is missing")
    if isinstance(error, RefusedImage):
        return BadRecord(str(error))
    return BadRecord(f"image is unreadable ({type(error).__name__})")


def key_sha256(key: str) -> str:
    """Return the hexadecimal sha256 of an image's key: its name in a `vargpt_rl.data.features.FeatureCache`."""
    return hashlib.sha256(key.encode()).hexdigest()
