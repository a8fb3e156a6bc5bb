"""The judge of edits: right ones are accepted, and every kind of wrong one is refused for what is wrong with it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vargpt_rl.common.averages import wilson
from vargpt_rl.data import shapes
from vargpt_rl.data.samples import Prompt
from vargpt_rl.data.shapes_edit_check import EditVerdict, check_edit, kind_of
from vargpt_rl.data.shapes_tasks import edit
from vargpt_rl.data.sources import ShapesConfig, ShapesSource

seeds = st.integers(0, 2**32 - 1)
KINDS = {"add", "remove", "shape", "colour", "size"}


def other(rng: np.random.Generator, values, old: str) -> str:
    return str(rng.choice([value for value in values if value != old]))


def moved(thing, rng):
    angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(0.16, 0.36)
    return replace(thing, x=thing.x + far * np.cos(angle), y=thing.y + far * np.sin(angle))


SPOILED = {
    "moved": moved,
    "recoloured": lambda thing, rng: replace(thing, colour=other(rng, shapes.COLOURS, thing.colour)),
    "reshaped": lambda thing, rng: replace(thing, shape=other(rng, shapes.SHAPES, thing.shape)),
    "larger": lambda thing, rng: replace(thing, size=1.4 * thing.size),
    "smaller": lambda thing, rng: replace(thing, size=0.7 * thing.size),
}
"""Ways to spoil a thing; by as little as an edit would ask for."""


def spoiled(scene: shapes.Scene, victim: shapes.Thing, how: str, rng) -> list[shapes.Thing]:
    return [SPOILED[how](thing, rng) if thing == victim else thing for thing in scene.things]


def fits(things) -> bool:
    inside = all(max(abs(t.x - 0.5), abs(t.y - 0.5)) + t.size / 2 <= 0.49 and t.size >= 0.16 for t in things)
    return inside and all(shapes.separate(a, b) for i, a in enumerate(things) for b in things[:i])


def verdict(before, after, make, rng) -> EditVerdict:
    """On an image of the things that ``make`` makes, once they can be told apart."""
    things = next((things for _ in range(100) if fits(things := make())), None)
    assume(things is not None)
    style, side = str(rng.choice(["clean", "commercial"])), int(rng.choice([64, 128]))
    return check_edit(before, after, shapes.render(replace(before, things=tuple(things)), side, style, rng))


def draw_edit(seed: int, wanted=lambda before, after: True):
    """The first edit of the seed's that is ``wanted``."""
    rng = np.random.default_rng(seed)
    while True:
        before = shapes.sample_scene(rng)
        after = edit(before, rng)[1]
        if wanted(before, after):
            return rng, before, after


def rest(before, after) -> list[shapes.Thing]:
    return [thing for thing in after.things if thing in before.things]


def changes_one_of_several(before, after) -> bool:
    return bool(rest(before, after)) and kind_of(before, after) in ("colour", "shape", "size")


@settings(max_examples=100)
@given(seeds)
def test_a_right_edit_is_accepted_and_none_at_all_is_not(seed):
    rng, before, after = draw_edit(seed)
    assert check_edit(before, after, shapes.render(after, 64, "commercial", rng)) == EditVerdict(True, True, "")
    undone = check_edit(before, after, shapes.render(before, 64, "commercial", rng))
    assert not undone.done and undone.kept and undone.reason


@settings(max_examples=50)
@given(seeds, st.sampled_from(sorted(SPOILED)))
def test_nothing_else_may_change(seed, how):
    rng, before, after = draw_edit(seed, rest)
    victim = rest(before, after)[0]
    found = verdict(before, after, lambda: spoiled(after, victim, how, rng), rng)
    assert not found.kept and f"the {victim.colour} {victim.shape} is not as it was" in found.reason


@settings(max_examples=50)
@given(seeds, st.sampled_from(sorted(SPOILED)))
def test_what_changes_must_be_as_asked_in_all_respects(seed, how):
    kinds = {"colour", "shape", "size"}
    if how in ("recoloured", "reshaped"):
        kinds.add("add")  # what is added may stand anywhere, in any size
    rng, before, after = draw_edit(seed, lambda before, after: kind_of(before, after) in kinds)
    victim = next(thing for thing in after.things if thing not in before.things)
    found = verdict(before, after, lambda: spoiled(after, victim, how, rng), rng)
    assert not found.done and f"there should be a {victim.colour} {victim.shape}" in found.reason


@settings(max_examples=40)
@given(seeds)
def test_nothing_may_be_lost(seed):
    rng, before, after = draw_edit(seed)
    victim = after.things[rng.integers(len(after.things))]
    found = verdict(before, after, lambda: [thing for thing in after.things if thing != victim], rng)
    assert not (found.kept if victim in before.things else found.done)


@settings(max_examples=40)
@given(seeds)
def test_nothing_may_be_added(seed):
    rng, before, after = draw_edit(seed)
    shape, colour = str(rng.choice(shapes.SHAPES)), str(rng.choice(list(shapes.COLOURS)))
    found = verdict(
        before, after, lambda: [*after.things, shapes.Thing(shape, colour, *rng.uniform(0.12, 0.88, 2), 0.17)], rng
    )
    assert not found.correct and found.reason


@settings(max_examples=40)
@given(seeds)
def test_the_change_must_be_made_to_the_right_thing(seed):
    rng, before, after = draw_edit(seed, changes_one_of_several)
    how = {"colour": "recoloured", "shape": "reshaped", "size": "smaller"}[kind_of(before, after)]
    found = verdict(before, after, lambda: spoiled(before, rest(before, after)[0], how, rng), rng)
    assert not found.done and not found.kept


@settings(max_examples=20)
@given(seeds)
def test_what_was_to_be_removed_may_not_be_another_thing_now(seed):
    rng, before, after = draw_edit(seed, lambda before, after: kind_of(before, after) == "remove")
    gone = next(thing for thing in before.things if thing not in after.things)
    found = verdict(before, after, lambda: [*after.things, SPOILED["recoloured"](gone, rng)], rng)
    assert not found.done and found.kept and "should not be there any more" in found.reason


def test_a_small_drift_is_forgiven():
    rng, before, after = np.random.default_rng(0), *scenes()
    drifted = [replace(thing, x=thing.x + 0.05, size=1.1 * thing.size) for thing in after.things]
    assert check_edit(before, after, shapes.render(replace(after, things=tuple(drifted)), 128, "clean", rng)).correct


def scenes() -> tuple[shapes.Scene, shapes.Scene]:
    """A red circle and a blue square; the circle turns green."""
    before = shapes.scene_for("a red circle left of a blue square", np.random.default_rng(1))
    circle, square = before.things
    return before, replace(before, caption="", things=(replace(circle, colour="green"), square))


def test_what_is_added_may_stand_anywhere():
    rng, (before, _) = np.random.default_rng(0), scenes()
    cross = shapes.Thing("cross", "green", 0.5, 0.2, 0.22)
    after = replace(before, things=(*before.things, cross))
    for thing, right in ((cross, True), (replace(cross, x=0.4, y=0.85), True), (replace(cross, colour="red"), False)):
        image = shapes.render(replace(before, things=(*before.things, thing)), 128, "clean", rng)
        assert check_edit(before, after, image).correct == right


def test_kinds():
    found = {kind_of(before, after) for _, before, after in map(draw_edit, range(60))}
    assert found == KINDS


def test_scores_are_shares_with_an_interval():
    source = ShapesSource(ShapesConfig())
    check = source.edit_check()
    prompts = [Prompt(after, text, shown=before) for before, text, after in source.edits(8, 0, "held_out")]
    rights = [source.load(prompt.id, 64) for prompt in prompts]
    images = [*rights[:6], *(source.load(prompt.shown, 64) for prompt in prompts[6:])]
    scores = check.scores(prompts, check(images, prompts))
    assert scores["overall"] == 0.75 and scores["n"] == 8
    assert (scores["overall_low"], scores["overall_high"]) == pytest.approx(wilson(6, 8))
    assert scores["done"] == 0.75 and scores["kept"] == 1.0
    assert scores.keys() - {"overall", "overall_low", "overall_high", "n", "done", "kept"} <= KINDS
    by_kind = [scores[kind_of(*check.scenes(prompt))] for prompt in prompts]
    assert np.mean(by_kind) == pytest.approx(0.75), "shares of the kinds, weighted by how often each comes"
