import re

import numpy as np
import pytest
from PIL import Image

from vargpt_rl.data.pictures import read_picture


def test_pictures_are_read_upright_on_white_in_rgb(tmp_path):
    path = tmp_path / "odd.png"
    Image.new("RGBA", (9, 5), (200, 100, 50, 0)).save(path)
    assert read_picture(path).getpixel((1, 1)) == (255, 255, 255)
    Image.fromarray(np.full((5, 9), 0x8123, np.uint16)).save(path)
    assert read_picture(path).getpixel((1, 1)) == (0x81,) * 3
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, :15] = 255
    photograph = Image.fromarray(pixels)
    photograph.getexif()[0x0112] = 6  # to be turned by a quarter, which brings the left side to the top
    photograph.save(path, exif=photograph.getexif())
    picture = np.asarray(read_picture(path))
    assert picture.shape == (30, 20, 3)
    assert picture[:15].min() == 255 and picture[15:].max() == 0


def test_pictures_that_cannot_be_read_are_named(tmp_path):
    for name in ("cut", "large"):
        Image.effect_noise((31, 31), 90).save(tmp_path / f"{name}.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:500])
    (tmp_path / "empty.png").write_bytes(b"")
    faults = {"empty": "cannot identify", "missing": "No such file", "large": "31 x 31 is more than 900 pixels"}
    for name, said in faults.items():
        path = tmp_path / f"{name}.png"
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: not a readable picture: .*{said}"):
            read_picture(path, max_pixels=900)
    assert read_picture(tmp_path / "large.png", max_pixels=1000).size == (31, 31)
    with pytest.raises(ValueError, match="cut.png: not a readable picture: .*truncated"):
        read_picture(tmp_path / "cut.png")
