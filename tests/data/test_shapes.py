import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vargpt_rl.data import shapes

seeds = st.integers(0, 2**32 - 1)
tasks = st.sampled_from(shapes.TASKS)
splits = st.sampled_from(["train", "held_out"])


def sample(seed: int, task: str | None = None, split: str = "train") -> shapes.Scene:
    return shapes.sample_scene(np.random.default_rng(seed), task, split)


@given(seeds, tasks, splits)
def test_sampled_scenes_are_what_their_captions_demand(seed, task, split):
    scene = sample(seed, task, split)
    requirement = shapes.parse(scene.caption)
    assert requirement.task == scene.task == task
    assert shapes.is_held_out(scene.caption) == (split == "held_out")
    wanted = [kind for kind in requirement.wanted for _ in range(kind.count)]
    assert [thing.shape for thing in scene.things] == [kind.shape for kind in wanted]
    for thing, kind in zip(scene.things, wanted, strict=True):
        assert kind.colour in (None, thing.colour)
        if kind.size:
            low, high = shapes.DIAMETERS[kind.size]
            assert low <= thing.size <= high


@given(seeds, tasks, splits)
def test_things_keep_apart_and_inside(seed, task, split):
    things = sample(seed, task, split).things
    for thing in things:
        assert min(thing.x, thing.y) - thing.size / 2 + 1e-9 >= shapes.MARGIN
        assert max(thing.x, thing.y) + thing.size / 2 <= 1 - shapes.MARGIN + 1e-9
    for a, b in itertools.combinations(things, 2):
        assert max(abs(a.x - b.x), abs(a.y - b.y)) - (a.size + b.size) / 2 >= shapes.GAP


@given(seeds)
def test_what_a_caption_leaves_open_has_its_default(seed):
    rng = np.random.default_rng(seed)
    (thing,) = shapes.scene_for("a circle", rng).things
    assert thing.colour == shapes.USUAL_COLOUR["circle"]
    assert max(abs(thing.x - 0.5), abs(thing.y - 0.5)) <= shapes.JITTER
    first, second = shapes.scene_for("a red square and a blue circle", rng).things
    assert first.x < 0.5 < second.x
    assert (first.colour, second.colour) == ("red", "blue")


def test_no_two_scenes_of_a_caption_are_alike():
    rng = np.random.default_rng(0)
    assert shapes.scene_for("a red square", rng) != shapes.scene_for("a red square", rng)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a small cross", shapes.Requirement("single_object", (shapes.Described("cross", size="small"),))),
        ("a large red circle", shapes.Requirement("colours", (shapes.Described("circle", "red", "large"),))),
        ("three crosses", shapes.Requirement("counting", (shapes.Described("cross", count=3),))),
        ("two green squares", shapes.Requirement("counting", (shapes.Described("square", "green", count=2),))),
        (
            "a circle and a square",
            shapes.Requirement("two_objects", (shapes.Described("circle"), shapes.Described("square"))),
        ),
        ("a red circle at the top", shapes.Requirement("position", (shapes.Described("circle", "red"),), place="top")),
        (
            "a red circle left of a blue square",
            shapes.Requirement(
                "position", (shapes.Described("circle", "red"), shapes.Described("square", "blue")), relation="left of"
            ),
        ),
        (
            "a red circle and a blue square",
            shapes.Requirement(
                "colour_attribution", (shapes.Described("circle", "red"), shapes.Described("square", "blue"))
            ),
        ),
    ],
)
def test_parse(caption, expected):
    assert shapes.parse(caption) == expected


@pytest.mark.parametrize("caption", ["", "a dog", "five circles", "a red circle and a red square", "A circle"])
def test_parse_names_a_foreign_caption(caption):
    with pytest.raises(ValueError, match=repr(caption)):
        shapes.parse(caption)


def test_every_caption_means_something_else():
    requirements = [shapes.parse(c) for t in shapes.TASKS for s in ("train", "held_out")
                    for form in shapes.captions(t, s) for c in form]  # fmt: skip
    assert len(requirements) == len(set(requirements)) > 2000


def test_splits():
    for task in shapes.TASKS:
        train, held_out = ({c for form in shapes.captions(task, s) for c in form} for s in ("train", "held_out"))
        assert held_out
        assert not train & held_out
        assert len(held_out) <= 0.5 * len(train)
    # Twelve captions are few: those held out must still differ in shape and in size.
    (plain,), sized = shapes.captions("single_object", "held_out")
    assert len(sized) == 2
    assert len({caption.split()[-1] for caption in (plain, *sized)}) == 3
    assert {caption.split()[1] for caption in sized} == {*shapes.SIZES}
    words = {word for form in shapes.captions("colours", "train") for caption in form for word in caption.split()}
    assert words >= {*shapes.COLOURS, *shapes.SHAPES}


def test_wordings_of_one_meaning_share_their_split():
    for first, second in [
        ("a {} and a {}", "a {1} and a {0}"),
        ("a red {} left of a blue {}", "a blue {1} right of a red {0}"),
    ]:
        for pair in itertools.permutations(shapes.SHAPES, 2):
            assert shapes.is_held_out(first.format(*pair)) == shapes.is_held_out(second.format(*pair))


def test_captions_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="no captions"):
        shapes.captions("counting", "test")
    with pytest.raises(ValueError, match="no captions"):
        shapes.captions("poetry", "train")


@pytest.mark.parametrize("style", shapes.STYLES)
@pytest.mark.parametrize("side", [64, 300])
def test_renders_are_determined_by_the_seed(style, side):
    scene = sample(3)
    first, second = (shapes.render(scene, side, style, np.random.default_rng(7)) for _ in range(2))
    assert first.size == (side, side)
    assert first.mode == "RGB"
    assert first.tobytes() == second.tobytes()


def test_render_draws_the_thing_where_it_is():
    scene = shapes.Scene("a red circle", "colours", (shapes.Thing("circle", "red", 0.3, 0.6, 0.4),))
    image = shapes.render(scene, 128, "clean", np.random.default_rng(0))
    assert image.getpixel((38, 77)) == shapes.COLOURS["red"]
    assert image.getpixel((100, 30)) == shapes.BACKGROUND
    red = (np.asarray(image)[..., 2] < 150).mean()
    assert red == pytest.approx(np.pi / 4 * 0.4**2, rel=0.03)


def test_commercial_images_have_a_darker_outline():
    scene = shapes.Scene("a red square", "colours", (shapes.Thing("square", "red", 0.5, 0.5, 0.5),))
    clean, commercial = (
        np.asarray(shapes.render(scene, 256, style, np.random.default_rng(0)))[..., 0].min()
        for style in ("clean", "commercial")
    )
    assert commercial < 0.7 * clean


def test_unknown_style():
    with pytest.raises(ValueError, match="sketch"):
        shapes.render(sample(0), 64, "sketch", np.random.default_rng(0))
