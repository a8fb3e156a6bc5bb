"""Images of records: references that travel instead of pixels, and their decoding."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image, ImageOps

from vargpt_rl.data.images import KINDS, MAX_PIXELS, ImageSource, as_rgb
from vargpt_rl.data.quarantine import BadRecord


@dataclass(frozen=True)
class OnDisk:
    """A file below the folder ``root``. Made by `on_disk`, which keeps it there."""

    root: Path
    name: str

    def open(self) -> io.BufferedReader:
        return (self.root / self.name).open("rb")


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
    """Refer to the image ``name`` below ``root``. BadRecord for a name that leads out of it; links are followed."""
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
        with reference.open() as file, Image.open(file, formats=KINDS) as image:
            if image.width * image.height > max_pixels:
                raise BadRecord(f"image of more than {max_pixels} pixels")
            return as_rgb(ImageOps.exif_transpose(image))
    except BadRecord:
        raise
    except FileNotFoundError as error:
        raise BadRecord("image is missing") from error
    except Image.DecompressionBombError as error:
        raise BadRecord(f"image of more than {max_pixels} pixels") from error
    except Exception as error:  # Pillow's decoders raise errors of many kinds on broken files
        raise BadRecord(f"image is unreadable ({type(error).__name__})") from error


def content_sha256(reference: ImageRef) -> str:
    """Return the hexadecimal sha256 of the encoded image, or of its key in a source. BadRecord if it is unreadable.

    The image is not decoded.
    """
    if isinstance(reference, InSource):
        return key_sha256(reference.key)
    try:
        with reference.open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise BadRecord("image is missing") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise BadRecord(f"image is unreadable ({type(error).__name__})") from error


def key_sha256(key: str) -> str:
    """Return the hexadecimal sha256 of an image's key: its name in a `vargpt_rl.data.features.FeatureCache`."""
    return hashlib.sha256(key.encode()).hexdigest()
