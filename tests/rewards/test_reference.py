import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from rewards.reference import ReferenceLikeness, likeness


def disc(colour="red", centre=32, radius=20, side=64, alpha=False):
    image = Image.new("RGBA", (side, side), (0, 0, 0, 0) if alpha else "white")
    box = [centre - radius, centre - radius, centre + radius, centre + radius]
    ImageDraw.Draw(image).ellipse(box, fill=colour)
    return image if alpha else image.convert("RGB")


@pytest.fixture
def reward(tmp_path):
    disc(alpha=True).save(tmp_path / "disc.png")
    Image.new("RGB", (64, 64), "white").save(tmp_path / "blank.png")
    lines = [
        {"id": "0", "caption": "a red disc", "file": "disc.png"},
        {"id": "1", "caption": "a red disc", "file": "blank.png"},
        {"id": "2", "caption": "nothing", "file": "blank.png"},
        {"id": "3", "caption": "a way out", "file": "../disc.png"},
        {"id": "4", "caption": "a lost image", "file": "gone.png"},
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return ReferenceLikeness(str(tmp_path / "captions.jsonl"), str(tmp_path))


def test_the_reference_itself_scores_one_at_any_size(reward):
    images = [disc(), disc().resize((256, 256)), Image.new("RGB", (64, 64), "white")]
    scores = reward(images, ["a red disc", "a red disc", "nothing"])
    assert scores[0] == 1 and scores[2] == 1
    assert scores[1] > 0.98  # scaling up blurs the edge


def test_likeness_falls_with_colour_place_and_size(reward):
    worse = [disc(), disc("orange"), disc("blue"), disc("blue", centre=20), disc("blue", centre=10, radius=5)]
    scores = reward(worse, ["a red disc"] * 5)
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 5


def test_likeness_is_between_0_and_1_and_symmetric():
    rng = np.random.default_rng(0)
    for _ in range(20):
        one, two = (Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)) for _ in range(2))
        assert 0 <= likeness(one, two) == likeness(two, one) <= 1
    assert likeness(Image.new("RGB", (8, 8), "black"), Image.new("RGB", (8, 8), "white")) == 0


def test_captions_without_an_image_are_not_scored(reward):
    assert reward([disc()], ["a green disc"]) == [None]


@pytest.mark.parametrize(("prompt", "message"), [("a way out", "outside"), ("a lost image", "gone.png")])
def test_bad_references_are_named(reward, prompt, message):
    with pytest.raises(ValueError, match=message):
        reward([disc()], [prompt])


def test_a_captions_file_without_file_names_is_refused(tmp_path):
    (tmp_path / "captions.jsonl").write_text('{"caption": "x"}')
    with pytest.raises(ValueError, match="no \\['file'\\]"):
        ReferenceLikeness(str(tmp_path / "captions.jsonl"), str(tmp_path))
