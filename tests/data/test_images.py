import re

import numpy as np
import pytest
from PIL import Image

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
    faults = {"empty": "cannot identify", "missing": "No such file", "large": "31 x 31 is more than 900 pixels"}
    for name, said in faults.items():
        path = tmp_path / f"{name}.png"
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: not a readable image: .*{said}"):
            read_image(path, max_pixels=900)
    assert read_image(tmp_path / "large.png", max_pixels=1000).size == (31, 31)
    with pytest.raises(ValueError, match="cut.png: not a readable image: .*truncated"):
        read_image(tmp_path / "cut.png")


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
