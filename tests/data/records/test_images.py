import hashlib
import io
import os
import socket
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.helpers.records import png
from vargpt_rl.data.images import KINDS, MAX_BYTES, read_image
from vargpt_rl.data.quarantine import BadRecord
from vargpt_rl.data.records.images import InArchive, InRecord, content_sha256, load, on_disk


def encoded(image: Image.Image, kind: str = "PNG", **options) -> InRecord:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return InRecord(file.getvalue())


def bomb(width: int, height: int) -> bytes:
    """The beginning of a PNG that claims to be of that size."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", size), (b"IDAT", zlib.compress(bytes(9))))
    parts = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_every_place_gives_the_same_image(tmp_path):
    data = png(3)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(data)
    (tmp_path / "archive").write_bytes(b"before" + data + b"behind")
    places = (
        on_disk(tmp_path, "./sub/a.png"),
        on_disk(tmp_path, "sub\\a.png"),
        InRecord(data),
        InArchive(tmp_path / "archive", 6, len(data)),
    )
    for place in places:
        assert np.array_equal(load(place), load(InRecord(data))) and load(place).size == (6, 4)


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "/etc/passwd", "sub/.."])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(BadRecord, match="image path leaves its folder"):
        on_disk(tmp_path, name)


@pytest.mark.parametrize("kind", KINDS)
def test_usual_kinds_are_read_as_rgb(kind):
    assert load(encoded(Image.new("RGB", (5, 3), (200, 0, 0)), kind)).mode == "RGB"


def test_colours_and_orientation():
    clear = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    assert load(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((4, 4), 0x8123, np.uint16))
    assert load(encoded(deep)).getpixel((0, 0)) == (0x81,) * 3
    lying = Image.new("RGB", (6, 3))
    lying.getexif()[0x0112] = 6
    assert load(encoded(lying, exif=lying.getexif())).size == (3, 6)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "kind empty file, expected one of AVIF, .*"),
        (b"\1\2\3\4", "no known kind, expected one of AVIF, .*"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "kind PostScript, expected one of AVIF, .*"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "kind HEIC, expected one of AVIF, .*"),
        (png()[:-40], r"unreadable \(OSError\)"),
        (bomb(8001, 8000), "more than 64000000 pixels"),
        (bomb(60_000, 60_000), "more than 64000000 pixels"),
    ],
    ids=["empty", "unknown", "PostScript", "HEIC", "cut off", "large", "huge"],
)
def test_unreadable_images_have_a_reason_that_is_always_the_same(data, reason):
    for _ in range(2):
        with pytest.raises(BadRecord, match=f"^image (is|of) {reason}$"):
            load(InRecord(data))


def test_missing_images_are_named_so(tmp_path):
    with pytest.raises(BadRecord, match="^image is missing$"):
        load(on_disk(tmp_path, "none.png"))
    with pytest.raises(BadRecord, match=r"^image is unreadable \(ValueError\)$"):
        load(on_disk(tmp_path, "a\0b.png"))


@pytest.mark.parametrize("make", ["pipe", "device", "folder", "socket", "enormous"])
def test_files_that_block_or_never_end_are_refused(tmp_path, make):
    path = tmp_path / "a.png"
    if make == "pipe":
        os.mkfifo(path)
    elif make == "device":
        path.symlink_to("/dev/zero")
    elif make == "folder":
        path.mkdir()
    elif make == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    else:
        path.touch()
        os.truncate(path, MAX_BYTES + 1)
    for read in (load, content_sha256):
        with pytest.raises(BadRecord, match="^image (is not a plain file|file of more|is unreadable)"):
            read(on_disk(tmp_path, "a.png"))
    with pytest.raises(ValueError, match=r"a\.png: not a readable image"):
        read_image(path)


def test_the_content_of_a_image_has_the_same_hash_in_every_place(tmp_path):
    data = png(3)
    (tmp_path / "a.png").write_bytes(data)
    (tmp_path / "archive").write_bytes(b"before" + data + b"behind")
    expected = hashlib.sha256(data).hexdigest()
    for place in (on_disk(tmp_path, "a.png"), InRecord(data), InArchive(tmp_path / "archive", 6, len(data))):
        assert content_sha256(place) == expected
    for name, reason in (("none.png", "missing"), ("a\0b.png", r"unreadable \(ValueError\)")):
        with pytest.raises(BadRecord, match=f"^image is {reason}$"):
            content_sha256(on_disk(tmp_path, name))
