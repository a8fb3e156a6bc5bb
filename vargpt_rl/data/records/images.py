"""Images of records: references that travel in place of pixels, and the one place where they are decoded."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from PIL import Image, ImageOps

from vargpt_rl.data.images import KINDS, MAX_PIXELS, as_rgb
from vargpt_rl.data.quarantine import BadRecord


@dataclass(frozen=True)
class OnDisk:
    """A file below the folder ``root``. Made by `on_disk`, which keeps it there."""

    root: Path
    name: str

    def open(self) -> BinaryIO:
        return (self.root / self.name).open("rb")


@dataclass(frozen=True)
class InRecord:
    """An encoded image that came with its record."""

    data: bytes

    def open(self) -> BinaryIO:
        return io.BytesIO(self.data)


@dataclass(frozen=True)
class InArchive:
    """A member of an uncompressed tar: ``size`` bytes at ``offset``."""

    archive: Path
    offset: int
    size: int

    def open(self) -> BinaryIO:
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))


ImageRef = OnDisk | InRecord | InArchive


def on_disk(root: Path, name: str) -> OnDisk:
    """The image ``name`` below ``root``. Raises BadRecord for a name that leads out of it; links are followed."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise BadRecord("image path leaves its folder")
    return OnDisk(root, str(path))


def load(reference: ImageRef, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The decoded image: RGB, upright, transparency laid on white. Raises BadRecord for one that is unreadable."""
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
    """Hexadecimal sha256 of the encoded image, read but not decoded. Raises BadRecord for one that cannot be read."""
    try:
        with reference.open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise BadRecord("image is missing") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise BadRecord(f"image is unreadable ({type(error).__name__})") from error
