"""Pictures of records: references that travel in place of pixels, and the one place where they are decoded."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from PIL import Image, ImageOps

from vargpt_rl.data.pictures import KINDS, MAX_PIXELS, as_rgb
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
    """An encoded picture that came with its record."""

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


Picture = OnDisk | InRecord | InArchive


def on_disk(root: Path, name: str) -> OnDisk:
    """The picture ``name`` below ``root``. Raises BadRecord for a name that leads out of it; links are followed."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise BadRecord("picture path leaves its folder")
    return OnDisk(root, str(path))


def load(picture: Picture, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The decoded picture: RGB, upright, transparency laid on white. Raises BadRecord for one that is unreadable."""
    try:
        with picture.open() as file, Image.open(file, formats=KINDS) as image:
            if image.width * image.height > max_pixels:
                raise BadRecord(f"picture of more than {max_pixels} pixels")
            return as_rgb(ImageOps.exif_transpose(image))
    except BadRecord:
        raise
    except FileNotFoundError as error:
        raise BadRecord("picture is missing") from error
    except Image.DecompressionBombError as error:
        raise BadRecord(f"picture of more than {max_pixels} pixels") from error
    except Exception as error:  # Pillow's decoders raise errors of many kinds on broken files
        raise BadRecord(f"picture is unreadable ({type(error).__name__})") from error


def content_sha256(picture: Picture) -> str:
    """Hexadecimal sha256 of the encoded picture, read but not decoded. Raises BadRecord for one that cannot be read."""
    try:
        with picture.open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise BadRecord("picture is missing") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise BadRecord(f"picture is unreadable ({type(error).__name__})") from error
