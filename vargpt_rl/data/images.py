"""Decoding of image files, and the square crops that are trained on."""

import io
import logging
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError

logger = logging.getLogger(__name__)

MAX_PIXELS = 64_000_000
MAX_BYTES = 2**28
"""Largest encoded image."""
KINDS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP")
"""Formats that are decoded. Pillow knows more, and runs a program for one of them (PostScript)."""
SIGNATURES = (
    (rb"\Z", "empty file"),
    (rb"....ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1)", "HEIC"),
    (rb"....ftyp(?!avi[fs])", "MP4 video"),
    (rb"(\xff\x0a|\0\0\0\x0cJXL )", "JPEG XL"),
    (rb"8BPS", "Photoshop"),
    (rb"%PDF", "PDF"),
    (rb"%!PS", "PostScript"),
    (rb"(\xef\xbb\xbf)?\s*(<\?xml|<svg)", "SVG or XML"),
    (rb"(\xef\xbb\xbf)?\s*<(!doctype\s+)?html", "HTML"),
    (rb"data:image/|iVBORw0KGgo|/9j/4", "base64 text"),
    (rb"RIFF....(?!WEBP)|\x1aE\xdf\xa3", "video or sound"),
    (rb"\x93NUMPY", "NumPy array"),
    (rb"7z\xbc\xaf\x27\x1c|Rar!|BZh[1-9]|\xfd7zXZ|\x28\xb5\x2f\xfd", "archive"),
    (rb"version https://git-lfs", "git-lfs pointer"),
    (rb"\x1f\x8b", "gzip"),
    (rb"PK\x03\x04", "zip archive"),
    (rb"\s*[{[]", "JSON"),
    (rb"\0\0[\1\2]\0", "icon or TGA"),
    (rb"P[1-7]\s", "PPM"),
    (rb"v/1\x01", "OpenEXR"),
    (rb"#\?RADIANCE", "Radiance HDR"),
    (rb"DDS ", "DDS"),
    (rb"qoif", "QOI"),
)
"""First bytes of files that people take for images, with the name of their kind."""
WHITE = (255, 255, 255)
MARGIN = 1.125
"""Ratio of an image's resized shorter side to the crop (VARGPT-v1.1's published training)."""


class RefusedImage(ValueError):
    """An image that is not decoded. The message is the reason, worded so that equal faults have equal reasons."""


class ImageSource(Protocol):
    """Images by key."""

    def load(self, key: str, side: int) -> Image.Image:
        """Load the image of ``key``: RGB, ``side`` pixels wide and high. Raises ValueError if it is unreadable."""
        ...


def read_image(path: Path, max_pixels: int = MAX_PIXELS, background: tuple[int, ...] = WHITE) -> Image.Image:
    """Read an image file as `decode` does. ValueError, naming it, if it is missing or unusable."""
    try:
        with open_plain(path) as file:
            return decode(file, max_pixels, background)
    except Exception as error:  # Pillow's decoders raise errors of many kinds on broken files
        raise ValueError(f"{path}: not a readable image: {error}") from error


def open_plain(path: Path) -> io.BufferedReader:
    """Open an image file. RefusedImage for one that is no plain file (a pipe would block, a device never ends) or too
    large; OSError or ValueError if it cannot be opened.
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe must not wait for its writer
    found = os.fstat(number)
    if not stat.S_ISREG(found.st_mode):
        os.close(number)
        raise RefusedImage("image is not a plain file")
    if found.st_size > MAX_BYTES:
        os.close(number)
        raise RefusedImage(f"image file of more than {MAX_BYTES} bytes")
    return os.fdopen(number, "rb")


def decode(file: BinaryIO, max_pixels: int = MAX_PIXELS, background: tuple[int, ...] = WHITE) -> Image.Image:
    """Decode an image as RGB: upright, in sRGB, 8 bits a channel, transparency laid on ``background``.

    RefusedImage for one of more than ``max_pixels``, of another kind than `KINDS`, or whose values have no known range;
    errors of many kinds for damaged data.
    """
    try:
        image = Image.open(file, formats=KINDS)
    except UnidentifiedImageError as error:
        kind = f"kind {known}" if (known := _kind(file)) else "no known kind"
        raise RefusedImage(f"image of {kind}, expected one of {', '.join(KINDS)}") from error
    except Image.DecompressionBombError as error:
        raise RefusedImage(f"image of more than {max_pixels} pixels") from error
    with image:
        if image.width * image.height > max_pixels:
            raise RefusedImage(f"image of more than {max_pixels} pixels")
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            _check_tiff(image)
        return as_rgb(_in_srgb(ImageOps.exif_transpose(image)), background)


def _check_tiff(image: TiffImagePlugin.TiffImageFile) -> None:
    """RefusedImage for numbers that Pillow hands on without their scale: signed, of 12 bits, or with white as 0."""
    tags = image.tag_v2
    if 2 in tags.get(TiffImagePlugin.SAMPLEFORMAT, ()):
        raise RefusedImage("TIFF of signed integers, expected unsigned ones")
    if image.mode.startswith(("I", "F")):  # others are scaled
        if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
            raise RefusedImage("TIFF of more than 8 bits with white as 0, expected black as 0")
        if 12 in tags.get(TiffImagePlugin.BITSPERSAMPLE, ()):
            raise RefusedImage("TIFF of 12 bits, expected 8 or 16")


def _kind(file: BinaryIO) -> str | None:
    """Return the kind of a file that is none of `KINDS`, if it is a usual one."""
    file.seek(0)
    head = file.read(64)
    return next((kind for pattern, kind in SIGNATURES if re.match(pattern, head, re.IGNORECASE | re.DOTALL)), None)


def _in_srgb(image: Image.Image) -> Image.Image:
    """Convert colours from the image's own ICC profile to sRGB. A damaged or unfitting profile is ignored."""
    data = image.info.pop("icc_profile", None)
    if not data or image.mode.startswith(("I", "F")):  # profiles are of 8 bits
        return image
    try:
        profile = ImageCms.getOpenProfile(io.BytesIO(data))
        if "sRGB" in ImageCms.getProfileDescription(profile):
            return image
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        plain = image
        if image.mode not in ("L", "RGB", "CMYK"):
            plain = image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")
        converted = ImageCms.profileToProfile(plain, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        logger.debug("an ICC profile is ignored: %s", error)
        return image
    assert converted is not None  # None only where it converts in place
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def as_rgb(image: Image.Image, background: tuple[int, ...] = WHITE) -> Image.Image:
    """Convert to RGB without transparency; 16 bits a channel are cut to 8, floats from 0 to 1 scaled.

    RefusedImage for other floats and for 32-bit integers, whose black and white are not known.
    """
    if image.mode.startswith("I;16"):  # converting would clip everything above 255 of 65535
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "I":
        raise RefusedImage("image of 32-bit integers, expected 8 or 16 bits a channel")
    elif image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # also for NaN
            raise RefusedImage("image of floats outside 0 to 1")
        image = Image.fromarray(np.round(values * 255).astype(np.uint8))
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image.convert("RGB")


def random_crop(image: Image.Image, resolution: int, rng: np.random.Generator) -> Image.Image:
    """Crop a random square of ``image``: RGB, ``resolution`` pixels a side.

    The shorter side is resized to ``MARGIN`` x ``resolution`` (Lanczos). Only the square itself is resampled, since a
    resized strip of 1 x 1000000 pixels would not fit in memory. Draws from ``rng`` exactly twice.
    """
    shorter = round(MARGIN * resolution)
    sides = [max(shorter, round(side * shorter / min(image.size))) for side in image.size]
    box = []
    for side, length in zip(sides, image.size, strict=True):
        first = int(rng.integers(side - resolution + 1))
        box.append((first * length / side, min(length, (first + resolution) * length / side)))
    (left, right), (top, bottom) = box
    size = (resolution, resolution)
    return as_rgb(image).resize(size, Image.Resampling.LANCZOS, box=(left, top, right, bottom))
