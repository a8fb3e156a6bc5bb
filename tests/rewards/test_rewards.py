from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageFilter

from rewards.shapes import shapes_reward
from rewards.technical import block_free, sharpness
from vargpt_rl.common.plugins import load_plugin, make_callable
from vargpt_rl.data.sources import ShapesConfig, ShapesSource


def test_shapes_reward_scores_captions_only():
    source = ShapesSource(ShapesConfig())
    image = source.load("commercial/1/a red circle", 64)
    prompts = ["a red circle", "a blue circle", "two circles", "a photograph of a cat"]
    assert shapes_reward([image] * 4, prompts) == [1.0, 0.0, 0.0, None]
    with pytest.raises(ValueError, match="zip"):
        shapes_reward([image], prompts)


def test_sharpness_falls_with_blur():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    blurred = [image, *(image.filter(ImageFilter.GaussianBlur(radius)) for radius in (1, 2, 4))]
    scores = sharpness(blurred, [""] * 4)
    assert scores == sorted(scores, reverse=True) and 0 < scores[-1] < scores[0] < 1
    assert sharpness([Image.new("RGBA", (3, 3))], [""]) == [0.0]
    with pytest.raises(ValueError, match="got 2 x 9"):
        sharpness([Image.new("L", (2, 9))], [""])


def test_sharpness_is_the_documented_formula():
    pixels = np.zeros((4, 4), np.uint8)
    pixels[1, 1] = 10  # its Laplacian is -40 there, 10 at two neighbours, 0 at the fourth inner pixel
    variance = np.var([-40, 10, 10, 0])
    assert sharpness([Image.fromarray(pixels)], [""]) == pytest.approx([variance / (variance + 100)])


@pytest.mark.parametrize("path", ["rewards.shapes:shapes_reward", "rewards.technical:sharpness"])
def test_rewards_are_found_by_path(path):
    assert make_callable(load_plugin(path), {})([Image.new("RGB", (64, 64))], ["a circle"]) == [0.0]


def test_jpeg_blocks_are_seen():
    across = np.linspace(0, 200, 96)
    smooth = np.random.default_rng(0).normal(across[:, None] + across[None] / 8, 3)
    image = Image.fromarray(smooth.clip(0, 255).astype(np.uint8)).convert("RGB")
    saved = [image]
    for quality in (30, 10, 3):
        file = BytesIO()
        image.save(file, "JPEG", quality=quality)
        saved.append(Image.open(file))
    untouched, *compressed = block_free(saved, [""] * 4)
    assert untouched > 0.95 and max(compressed) < 0.8 and compressed[-1] == min(compressed), (untouched, compressed)
    assert block_free([Image.new("RGBA", (16, 16))], [""]) == [1.0]
    with pytest.raises(ValueError, match="at least 16 x 16 pixels, got 15 x 20"):
        block_free([Image.new("L", (15, 20))], [""])


def test_blocks_are_the_documented_formula():
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:, 8:] = 10  # the only step, 10, is at the border across; there is none down
    assert block_free([Image.fromarray(pixels)], [""]) == pytest.approx([1 / (10 / 2 + 1)])
