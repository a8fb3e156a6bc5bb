import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from vargpt_rl.common.averages import with_interval
from vargpt_rl.data import shapes, shapes_check
from vargpt_rl.data.samples import Prompt

RED, BLUE = shapes.COLOURS["red"], shapes.COLOURS["blue"]


def right(number: int, side: int, style: str, blur: float = 0) -> float:
    """Share of freshly rendered images that are accepted with their own caption."""
    rng = np.random.default_rng(side)
    accepted = 0
    for index in range(number):
        scene = shapes.sample_scene(rng, shapes.TASKS[index % len(shapes.TASKS)])
        image = shapes.render(scene, side, style, rng).filter(ImageFilter.GaussianBlur(blur))
        accepted += shapes_check.check(image, scene.caption).correct
    return accepted / number


@pytest.mark.parametrize(("side", "least"), [(64, 0.98), (128, 0.995), (256, 0.995)])
@pytest.mark.parametrize("style", ["clean", "commercial"])
def test_accepts_right_images(style, side, least):
    assert right(90, side, style) >= least


def test_accepts_blurred_images():
    assert right(90, 128, "commercial", blur=1) >= 0.98


def test_accepts_corpus_images_unless_they_are_wrong(monkeypatch):
    monkeypatch.setattr(shapes, "WRONG_RATE", 0.0)
    assert right(90, 128, "corpus") >= 0.97
    monkeypatch.setattr(shapes, "WRONG_RATE", 1.0)
    assert right(90, 128, "corpus") <= 0.02


@pytest.mark.parametrize("style", ["clean", "commercial"])
def test_finds_things_where_they_are(style):
    rng = np.random.default_rng(2)
    for _ in range(40):
        scene = shapes.sample_scene(rng)
        found = sorted(shapes_check.find_things(shapes.render(scene, 128, style, rng)), key=lambda t: (t.x, t.y))
        for thing, true in zip(found, sorted(scene.things, key=lambda t: (t.x, t.y)), strict=True):
            assert (thing.shape, thing.colour) == (true.shape, true.colour)
            assert (thing.x, thing.y) == pytest.approx((true.x, true.y), abs=0.01)
            assert thing.size == pytest.approx(true.size, rel=0.05)


@pytest.mark.parametrize(
    ("caption", "wrong"),
    [
        ("a red circle", "a blue circle"),
        ("a red circle", "a red square"),
        ("a small circle", "a large circle"),
        ("a small red circle", "a large red circle"),
        ("three green squares", "two green squares"),
        ("three green squares", "three blue squares"),
        ("a circle and a square", "a circle"),
        ("a circle and a square", "a circle and a cross"),
        ("a red circle and a blue square", "a blue circle and a red square"),
        ("a red circle on the left", "a red circle on the right"),
        ("a red circle in the centre", "a red circle at the top"),
        ("a red circle left of a blue square", "a red circle right of a blue square"),
        ("a red circle above a blue square", "a red circle left of a blue square"),
    ],
)
def test_rejects_another_caption(caption, wrong):
    rng = np.random.default_rng(4)
    for _ in range(4):
        image = shapes.render(shapes.scene_for(caption, rng), 64, "commercial", rng)
        things = tuple(shapes_check.find_things(image))
        assert shapes_check.check(image, caption) == shapes_check.ImageVerdict(True, "", things)
        verdict = shapes_check.check(image, wrong)
        assert not verdict.correct
        assert verdict.reason


def drawn(draw) -> Image.Image:
    canvas = Image.new("RGB", (128, 128), shapes.BACKGROUND)
    draw(ImageDraw.Draw(canvas))
    return canvas


@pytest.mark.parametrize(
    "draw",
    [
        lambda d: d.ellipse((20, 40, 98, 100), fill=RED),
        lambda d: d.rectangle((20, 40, 100, 80), fill=RED),
        lambda d: d.ellipse((20, 20, 100, 100), outline=RED, width=12),
        lambda d: d.polygon([(64, 20), (108, 64), (64, 108), (20, 64)], fill=RED),
        lambda d: d.polygon([(20, 20), (100, 20), (60, 90)], fill=RED),
        lambda d: d.pieslice((20, 20, 100, 100), 40, 320, fill=RED),
    ],
    ids=["ellipse", "bar", "ring", "diamond", "inverted triangle", "cut circle"],
)
def test_foreign_shapes_are_unknown(draw):
    (thing,) = shapes_check.find_things(drawn(draw))
    assert (thing.shape, thing.colour) == (shapes_check.UNKNOWN, "red")


def test_foreign_and_mixed_colours_are_unknown():
    def two_toned(d):
        d.rectangle((20, 20, 60, 100), fill=RED)
        d.rectangle((60, 20, 100, 100), fill=BLUE)

    for draw in (two_toned, lambda d: d.ellipse((20, 20, 90, 90), fill=(90, 90, 90))):
        (thing,) = shapes_check.find_things(drawn(draw))
        assert thing.colour == shapes_check.UNKNOWN


def test_a_thing_of_unclear_colour_does_not_pass_for_a_shape_of_any_colour():
    grey = drawn(lambda d: d.ellipse((20, 20, 90, 90), fill=(90, 90, 90)))
    assert not shapes_check.check(grey, "a circle").correct


def test_specks_are_overlooked_and_further_things_are_not():
    def speck(d):
        d.ellipse((20, 20, 80, 80), fill=RED)
        d.rectangle((100, 100, 105, 105), fill=BLUE)

    def further(d):
        speck(d)
        d.rectangle((95, 95, 112, 112), fill=BLUE)

    assert shapes_check.check(drawn(speck), "a red circle").correct
    assert not shapes_check.check(drawn(further), "a red circle").correct


def test_empty_image():
    verdict = shapes_check.check(Image.new("RGB", (64, 64), shapes.BACKGROUND), "a circle")
    assert verdict == shapes_check.ImageVerdict(False, "expected 1 things, found 0", ())


def test_refuses_oblong_images_and_foreign_captions():
    with pytest.raises(ValueError, match="128 x 64"):
        shapes_check.find_things(Image.new("RGB", (128, 64)))
    with pytest.raises(ValueError, match="a dog"):
        shapes_check.check(Image.new("RGB", (64, 64)), "a dog")


def test_scores_are_by_task():
    prompts = [Prompt(text, text) for text in ("a circle", "a red circle", "a blue square")]
    verdicts = [shapes_check.ImageVerdict(correct, "", ()) for correct in (True, False, True)]
    scores = shapes_check.ShapesCheck().scores(prompts, verdicts)
    assert scores["single_object"] == 1.0 and scores["colours"] == 0.5
    assert scores["overall"] == pytest.approx(2 / 3) and scores["n"] == 3


def test_repeated_captions_widen_the_interval():
    prompts = [Prompt(str(i), caption) for i, caption in enumerate(["a red circle", "a cyan cross", "a square"] * 5)]
    verdicts = [shapes_check.ImageVerdict("circle" in prompt.text, "", ()) for prompt in prompts]
    found = shapes_check.ShapesCheck().scores(prompts, verdicts)
    independent = with_interval("overall", [float(verdict.correct) for verdict in verdicts])
    assert found["overall"] == independent["overall"]
    assert found["overall_low"] < independent["overall_low"] and independent["overall_high"] < found["overall_high"]


def test_the_check_reads_images():
    rng = np.random.default_rng(0)
    scene = shapes.sample_scene(rng, "colours")
    image = shapes.render(scene, 128, "clean", rng)
    prompts = [Prompt("", scene.caption), Prompt("", "four red crosses")]
    assert [verdict.correct for verdict in shapes_check.ShapesCheck()([image, image], prompts)] == [True, False]
