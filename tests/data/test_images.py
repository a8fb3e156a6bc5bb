import re
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from vargpt_rl.data.images import random_crop, read_image


def test_images_are_read_upright_on_white_in_rgb(tmp_path):
    path = tmp_path / "odd.png"
    Image.new("RGBA", (9, 5), (200, 100, 50, 0)).save(path)
    assert read_image(path).getpixel((1, 1)) == (255, 255, 255)
    Image.fromarray(np.full((5, 9), 0x8123, np.uint16)).save(path)
    assert read_image(path).getpixel((1, 1)) == (0x81,) * 3
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, :15] = 255
    photograph = Image.fromarray(pixels)
    photograph.getexif()[0x0112] = 6  # to be turned by a quarter, which brings the left side to the top
    photograph.save(path, exif=photograph.getexif())
    image = np.asarray(read_image(path))
    assert image.shape == (30, 20, 3)
    assert image[:15].min() == 255 and image[15:].max() == 0


def test_images_that_cannot_be_read_are_named(tmp_path):
    for name in ("cut", "large"):
        Image.effect_noise((31, 31), 90).save(tmp_path / f"{name}.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:500])
    (tmp_path / "empty.png").write_bytes(b"")
    faults = {"empty": "image of kind empty file", "missing": "No such file", "large": "image of more than 900 pixels"}
    for name, said in faults.items():
        path = tmp_path / f"{name}.png"
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: not a readable image: .*{said}"):
            read_image(path, max_pixels=900)
    assert read_image(tmp_path / "large.png", max_pixels=1000).size == (31, 31)
    with pytest.raises(ValueError, match="cut.png: not a readable image: .*truncated"):
        read_image(tmp_path / "cut.png")


RAMP = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (64, 1))


def test_depths_are_scaled_or_refused_and_never_clipped(tmp_path):
    depths = {
        "8": (RAMP * 255).astype(np.uint8),
        "16": (RAMP * 65535).astype(np.uint16),
        "float": RAMP,
        "int": (RAMP * 65535).astype(np.int32),
        "wide": RAMP * 255,
        "nan": np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32),
    }
    refused = {}
    for name, pixels in depths.items():
        path = tmp_path / f"{name}.tif"
        Image.fromarray(pixels).save(path)
        try:
            assert 125 < np.asarray(read_image(path)).mean() < 129, name
        except ValueError as error:
            refused[name] = str(error).partition("image: ")[2]
    assert refused == {
        "int": "TIFF of signed integers, expected unsigned ones",
        "wide": "image of floats outside 0 to 1",
        "nan": "image of floats outside 0 to 1",
    }


def swapped_profile() -> bytes:
    """An ICC profile whose red is sRGB's green and the other way round, so that conversion is plain to see."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(profile[128:132], "big")
    tags = {bytes(profile[at : at + 4]): at for at in range(132, 132 + 12 * count, 12)}
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    profile[red + 4 : red + 12], profile[green + 4 : green + 12] = (
        profile[green + 4 : green + 12],
        profile[red + 4 : red + 12],
    )
    return bytes(profile).replace("sRGB built-in".encode("utf-16-be"), "RGBs built-in".encode("utf-16-be"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "CMYK"])
def test_colours_are_converted_from_the_images_own_profile(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    green = Image.new("RGBA", (8, 8), (0, 255, 0, 255)).convert("RGB" if mode in ("P", "CMYK") else mode)
    green.convert(mode).save(path, icc_profile=swapped_profile())
    pixel = read_image(path).getpixel((4, 4))
    if mode in ("RGB", "RGBA", "P"):
        assert pixel[0] > 250 and max(pixel[1:]) < 5, "the profile's green is red"
    else:  # the profile is of another colour space, and ignored
        plain = tmp_path / f"plain{path.suffix}"
        green.convert(mode).save(plain)
        assert pixel == read_image(plain).getpixel((4, 4))


def test_an_image_whose_profile_does_not_fit_is_left_as_it_is(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.full((8, 8), 30000, np.uint16)).save(path, icc_profile=swapped_profile())
    assert read_image(path).getpixel((4, 4)) == (30000 >> 8,) * 3
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(path, icc_profile=swapped_profile()[:200])
    assert read_image(path).getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("profile", [b"", b"no profile", swapped_profile()[:200]], ids=["empty", "words", "cut off"])
def test_damaged_profiles_are_ignored_and_srgb_is_exact(tmp_path, profile):
    path = tmp_path / "a.png"
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    Image.fromarray(pixels).save(path, icc_profile=profile)
    assert (np.asarray(read_image(path)) == pixels).all()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels).save(path, icc_profile=srgb)
    assert (np.asarray(read_image(path)) == pixels).all()


def test_transparency_outlives_a_profile(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGBA", (8, 8), (0, 255, 0, 0)).save(path, icc_profile=swapped_profile())
    assert read_image(path).getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\xff\x0a\x7f", "JPEG XL"),
        (b"8BPS\0\1", "Photoshop"),
        (b"%PDF-1.7", "PDF"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG or XML"),
        (b"<!DOCTYPE html>\n<html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b"", "empty file"),
        (b"\0\0\0\x20ftypisom\0\0\2\0", "MP4 video"),
        (b"PK\x03\x04\x14\0", "zip archive"),
        (b'{"error": "not found"}', "JSON"),
        (b"\0\0\1\0\1\0 \0", "icon or TGA"),
        (b"P6\n8 8\n255\n", "PPM"),
        (b"v/1\x01\2\0\0\0", "OpenEXR"),
        (b"#?RADIANCE\n", "Radiance HDR"),
        (b"DDS |\0\0\0", "DDS"),
        (b"qoif\0\0", "QOI"),
        (b"\xef\xbb\xbf<!DOCTYPE html>", "HTML"),
        (b"data:image/png;base64,iVBORw0KGgo", "base64 text"),
        (b"/9j/4AAQSkZJRg", "base64 text"),
        (b"RIFF\x24\0\0\0AVI LIST", "video or sound"),
        (b"\x1aE\xdf\xa3\x9fB", "video or sound"),
        (b"\x93NUMPY\1\0", "NumPy array"),
        (b"Rar!\x1a\7\0", "archive"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path, head, kind):
    path = tmp_path / "a.png"
    path.write_bytes(head)
    with pytest.raises(ValueError, match=f"a.png: not a readable image: image of kind {kind}, expected one of AVIF, "):
        read_image(path)


def tiff(bits: int, form: int, photometric: int, data: bytes) -> bytes:
    """A grey TIFF of 8 x 8 pixels. ``form``: 1 unsigned, 2 signed, 3 floats; ``photometric``: 0 for white as 0."""
    tags = [(256, 8), (257, 8), (258, bits), (259, 1), (262, photometric), (273, 0), (277, 1), (278, 8)]
    tags += [(279, len(data)), (339, form)]
    begin = 8 + 2 + 12 * len(tags) + 4
    entries = [struct.pack("<HHII", tag, 4, 1, begin if tag == 273 else value) for tag, value in tags]
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4) + data


@pytest.mark.parametrize(
    ("bits", "form", "photometric", "said"),
    [
        (16, 1, 0, "TIFF of more than 8 bits with white as 0"),
        (32, 3, 0, "TIFF of more than 8 bits with white as 0"),
        (12, 1, 1, "TIFF of 12 bits"),
        (8, 2, 1, "TIFF of signed integers"),
        (16, 2, 1, "TIFF of signed integers"),
        (32, 2, 1, "TIFF of signed integers"),
        (32, 1, 1, "image of 32-bit integers"),
    ],
)
def test_tiffs_whose_numbers_have_no_known_scale_are_refused(tmp_path, bits, form, photometric, said):
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(bits, form, photometric, bytes(8 * bits)))
    with pytest.raises(ValueError, match=f"a.tif: not a readable image: {said}"):
        read_image(path)


@pytest.mark.parametrize(
    ("bits", "form", "photometric", "value", "grey"),
    [(8, 1, 1, b"\x37", 0x37), (8, 1, 0, b"\x37", 0xC8), (16, 1, 1, b"\x12\x37", 0x37), (32, 3, 1, b"\0\0\0\x3f", 128)],
)
def test_tiffs_of_other_depths_have_their_brightness(tmp_path, bits, form, photometric, value, grey):
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(bits, form, photometric, 64 * value))
    assert read_image(path).getpixel((3, 3)) == (grey,) * 3


class Offsets:
    """Stands for a generator: gives the offsets it was made with and notes what was asked."""

    def __init__(self, *offsets: int):
        self.offsets, self.asked = list(offsets), []

    def integers(self, high: int) -> int:
        self.asked.append(high)
        return self.offsets.pop(0)


@pytest.mark.parametrize("size", [(90, 60), (60, 91), (700, 500), (64, 64)])
def test_a_crop_is_cut_from_the_image_made_a_bit_larger(size):
    noise = Image.merge("RGB", [Image.effect_noise(size, 15) for _ in range(3)])  # faint: overshoot is not clipped
    sides = [round(side * 72 / min(size)) for side in size]
    offsets = Offsets(3, 5)
    crop = np.asarray(random_crop(noise, 64, offsets)).astype(int)
    assert offsets.asked == [sides[0] - 63, sides[1] - 63], "every place in the larger image is possible"
    whole = noise.resize(sides, Image.Resampling.LANCZOS)
    expected = np.asarray(whole.crop((3, 5, 67, 69))).astype(int)
    assert np.abs(crop - expected).max() <= 2  # the same filter at the same places, in 8 bits between its two passes


def test_a_crop_is_the_generators_and_always_a_square_in_rgb():
    image = Image.effect_noise((200, 100), 90)
    crops = [np.asarray(random_crop(image, 32, np.random.default_rng(seed))) for seed in (1, 1, 2)]
    assert (crops[0] == crops[1]).all() and (crops[0] != crops[2]).any()
    for size in ((1, 1), (1, 1_000_000), (31, 33)):
        crop = random_crop(Image.new("L", size, 77), 32, np.random.default_rng(0))
        assert crop.mode == "RGB" and crop.size == (32, 32) and crop.getpixel((9, 9)) == (77,) * 3
    corner = random_crop(image, 32, Offsets(72 - 32, 4))
    assert corner.size == (32, 32), "the last place that fits"
