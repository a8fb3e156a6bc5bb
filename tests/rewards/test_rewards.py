import numpy as np
import pytest
from PIL import Image, ImageFilter

from rewards.shapes import shapes_reward
from rewards.technical import sharpness
from vargpt_rl.data.sources import ShapesConfig, ShapesSource
from vargpt_rl.plugins import load_plugin, make_callable


def test_shapes_reward_tells_right_from_wrong_and_leaves_other_prompts():
    source = ShapesSource(ShapesConfig())
    picture = source.load("commercial/1/a red circle", 64)
    prompts = ["a red circle", "a blue circle", "two circles", "a photograph of a cat"]
    assert shapes_reward([picture] * 4, prompts) == [1.0, 0.0, 0.0, None]
    with pytest.raises(ValueError, match="zip"):
        shapes_reward([picture], prompts)


def test_sharpness_falls_with_blur():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    blurred = [picture, *(picture.filter(ImageFilter.GaussianBlur(radius)) for radius in (1, 2, 4))]
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
