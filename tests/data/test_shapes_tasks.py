import re
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vargpt_rl.data import shapes
from vargpt_rl.data.shapes_tasks import PLACES_TO_ADD, edit, question

seeds = st.integers(0, 2**32 - 1)
KIND = r"(red|green|blue|yellow|purple|cyan)? ?(circle|square|triangle|cross)(?:e?s)?"


def answer(scene: shapes.Scene, text: str) -> str:
    """The answer, found from the words of the question alone."""
    if match := re.fullmatch(r"what colour is the (\w+)\?", text):
        (colour,) = (t.colour for t in scene.things if t.shape == match[1])
        return colour
    if match := re.fullmatch(r"what shape is the (\w+) thing\?", text):
        (shape,) = (t.shape for t in scene.things if t.colour == match[1])
        return shape
    if text == "how many things are there?":
        return ("one", "two", "three", "four")[len(scene.things) - 1]
    if match := re.fullmatch(r"is there a (\w+) (\w+)\?", text):
        return "yes" if any((t.colour, t.shape) == (match[1], match[2]) for t in scene.things) else "no"
    match = re.fullmatch(r"is the (\w+) (left of|right of|above|below) the (\w+)\?", text)
    (a,), (b,) = ([t for t in scene.things if t.shape == match[i]] for i in (1, 3))
    true = {"left of": a.x < b.x, "right of": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}
    return "yes" if true[match[2]] else "no"


@settings(max_examples=300)
@given(seeds)
def test_answers_are_right(seed):
    rng = np.random.default_rng(seed)
    scene = shapes.sample_scene(rng)
    asked, answered = question(scene, rng)
    assert answered == answer(scene, asked)


def test_all_kinds_are_asked_and_yes_is_as_frequent_as_no():
    rng = np.random.default_rng(0)
    asked = [question(shapes.sample_scene(rng), rng) for _ in range(2000)]
    starts = Counter(" ".join(text.split()[:2]) for text, _ in asked)
    assert set(starts) == {"what colour", "what shape", "how many", "is there", "is the"}
    answers = Counter(reply for _, reply in asked)
    assert 0.85 < answers["yes"] / answers["no"] < 1.18


def named(things: tuple[shapes.Thing, ...], words: str) -> set[shapes.Thing]:
    colour, shape = re.search(KIND, words).groups()
    return {t for t in things if t.shape == shape and colour in (None, t.colour)}


@settings(max_examples=300)
@given(seeds)
def test_edits_do_what_they_say_and_nothing_else(seed):
    rng = np.random.default_rng(seed)
    scene = shapes.sample_scene(rng)
    instruction, edited = edit(scene, rng)
    before, after = set(scene.things), set(edited.things)
    gone, new = before - after, after - before
    verb, rest = instruction.split(maxsplit=1)
    if verb == "add":
        assert not gone
        (thing,) = new
        assert rest == f"a {thing.colour} {thing.shape}"
        assert {thing.x, thing.y} <= set(PLACES_TO_ADD)
        assert all(shapes.separate(thing, other) for other in scene.things)
        return
    assert gone == named(scene.things, rest.split(" into ")[0])
    if verb == "remove":
        assert not new
        assert after
        return
    assert len(new) == len(gone)
    last = rest.split()[-1]
    for old, thing in zip(scene.things, edited.things, strict=True):
        changes = {f: getattr(thing, f) for f in ("shape", "colour", "x", "y", "size")
                   if getattr(thing, f) != getattr(old, f)}  # fmt: skip
        if old not in gone:
            assert not changes
        elif verb == "turn":
            assert changes == {"shape": re.search(KIND, last)[2]}
        elif last in ("larger", "smaller"):
            assert set(changes) == {"size"}
            assert (thing.size > old.size) == (last == "larger")
        else:
            assert changes == {"colour": last}


def test_an_added_thing_stands_at_its_default_place():
    rng, added = np.random.default_rng(2), Counter()
    while added.total() < 20:
        scene = shapes.scene_for("a red circle on the left", rng)
        instruction, edited = edit(scene, rng)
        if instruction.startswith("add"):
            added[edited.things[1].x, edited.things[1].y] += 1
    assert set(added) == {(PLACES_TO_ADD[2], PLACES_TO_ADD[0])}, "the first in reading order of those far from it"


def test_all_kinds_of_edit_occur():
    rng = np.random.default_rng(1)
    edits = [edit(shapes.sample_scene(rng), rng)[0] for _ in range(500)]
    assert {text.split()[0] for text in edits} == {"make", "turn", "add", "remove"}
    assert {text.split()[-1] for text in edits} >= {"larger", "smaller", *shapes.COLOURS}
