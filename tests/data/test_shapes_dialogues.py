"""Conversations of the shapes world: each turn follows from those before it."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vargpt_rl.data.shapes import COLOURS, SHAPES, Scene, Thing, is_held_out, parse, render
from vargpt_rl.data.shapes_dialogues import DESCRIBE, SMALL_TALK, ask, describe, dialogue, varied_scene
from vargpt_rl.data.shapes_edit_check import check_edit
from vargpt_rl.data.shapes_tasks import edit
from vargpt_rl.model.prompt import REPLY


@given(seed=st.integers(0, 2**32), turns=st.integers(1, 6))
def test_turns_draw_what_was_asked_for_or_answer_about_the_latest_image(seed, turns):
    talk = dialogue(np.random.default_rng(seed), turns)
    assert len(talk.turns) == turns
    latest = None
    for turn in talk.turns:
        if turn.shown:
            assert latest in (None, turn.shown), "only the latest image is shown again"
            latest = turn.shown
        if turn.drawn is None:
            assert turn.reply != REPLY
            assert turn.text in SMALL_TALK or latest is not None, "a question about nothing"
            if turn.text == DESCRIBE:
                assert turn.reply == describe(latest)
            continue
        assert turn.reply == REPLY
        if turn.drawn.caption:
            assert turn.text == turn.drawn.caption and not is_held_out(turn.text)
        else:
            assert latest is not None and turn.drawn.things != latest.things, "a change of nothing"
        latest = turn.drawn


@pytest.mark.parametrize("seed", range(3))
def test_changes_are_those_that_the_exact_check_wants(seed):
    rng = np.random.default_rng(seed)
    checked = 0
    for talk in (dialogue(rng, 4) for _ in range(40)):
        latest = None
        for turn in talk.turns:
            latest = turn.shown or latest
            if turn.drawn and not turn.drawn.caption:
                image = render(turn.drawn, 128, "clean", rng)
                assert check_edit(latest, turn.drawn, image).correct, (turn.text, latest)
                checked += 1
            latest = turn.drawn or latest
    assert checked > 20


def test_held_out_dialogues_have_held_out_captions():
    rng = np.random.default_rng(0)
    drawn = [turn.drawn for _ in range(40) for turn in dialogue(rng, 4, split="held_out").turns if turn.drawn]
    assert all(is_held_out(scene.caption) for scene in drawn if scene.caption)


def test_a_description_names_every_thing_once_in_reading_order():
    corner = Thing("circle", "red", 0.2, 0.2, 0.25)
    right = Thing("square", "blue", 0.75, 0.5, 0.25)
    bottom = Thing("cross", "cyan", 0.5, 0.8, 0.25)
    things = (bottom, right, corner)
    assert describe(Scene("", "", things)) == (
        "a red circle at the top on the left and a blue square on the right and a cyan cross at the bottom"
    )
    assert describe(Scene("", "", (Thing("cross", "cyan", 0.5, 0.5, 0.25),))) == "a small cyan cross in the centre"


@given(seed=st.integers(0, 2**32))
def test_descriptions_have_the_scenes_kinds(seed):
    scene = varied_scene(np.random.default_rng(seed))
    found = re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", describe(scene))
    assert sorted(found) == sorted((thing.colour, thing.shape) for thing in scene.things)
    if scene.caption:
        assert len(scene.things) == sum(wanted.count for wanted in parse(scene.caption).wanted)


def test_shares_of_descriptions():
    rng = np.random.default_rng(0)
    scene = edit(varied_scene(rng), rng)[1]
    assert all(ask(scene, rng, described=1.0)[0] == DESCRIBE for _ in range(5))
    assert all(ask(scene, rng, described=0.0)[0] != DESCRIBE for _ in range(20))
