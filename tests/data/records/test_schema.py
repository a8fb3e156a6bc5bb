from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.records import png
from vargpt_rl.data.quarantine import BadRecord
from vargpt_rl.data.records.images import InRecord, OnDisk
from vargpt_rl.data.records.schema import (
    DRAWN,
    SHOWN,
    Limit,
    Message,
    RecordConversation,
    checked,
    loaded,
    pieces,
    placeholders,
    problem,
)

A, B = OnDisk(Path("images"), "a.png"), OnDisk(Path("images"), "b.png")


def talk(task: str, *texts: str, images: tuple = ()) -> RecordConversation:
    messages = tuple(Message(("user", "assistant")[turn % 2], text) for turn, text in enumerate(texts))
    return RecordConversation("r1", "test", task, messages, images)


GOOD = [
    talk("understanding", "hello", "hello to you"),
    talk("understanding", "<image>\nwhat is it?", "a cat", "and <image>?", "a dog", images=(A, B)),
    talk("generation", "draw a cat", "Here it is.<image_gen>", images=(A,)),
    talk("generation", "draw a cat", "<image_gen>", "and a dog", "<image_gen>", images=(A, B)),
    talk("editing", "<image>make it red", "Here it is.<image_gen>", images=(A, B)),
]


@pytest.mark.parametrize("record", GOOD)
def test_good_records(record):
    assert problem(record, Limit()) is None
    assert checked(record, Limit()) is record


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (replace(GOOD[0], id=7), "id is of type int, expected str"),
        (replace(GOOD[0], id=" "), "id is empty"),
        (replace(GOOD[0], source=None), "source is of type NoneType, expected str"),
        (replace(GOOD[0], task=["understanding"]), "task is of type list, expected str"),
        (replace(GOOD[0], task="dancing"), "unknown task, expected one of understanding, generation, editing"),
        (talk("understanding", "hello", b"bytes"), "text of turn 2 is of type bytes, expected str"),
        (talk("understanding", "a\0", "b"), "text of turn 1 has characters that are no text"),
        (talk("understanding", "a\x1b[31m", "b"), "text of turn 1 has characters that are no text"),
        (talk("understanding", "\u200b\u00a0", "b"), "empty question"),
        (talk("understanding", "a", "\ufeff"), "empty answer"),
        (talk("understanding", "a", "\ud83d"), "text of turn 2 has characters that are no text"),
        (replace(GOOD[2], images=("a.png",)), "image is of type str"),
        (talk("understanding"), "no turns"),
        (replace(GOOD[0], messages=GOOD[0].messages[1:]), "first turn is not the user's"),
        (replace(GOOD[0], messages=GOOD[0].messages[:1] * 2), "turns do not alternate between user and assistant"),
        (talk("understanding", "a", "b", "c"), "last turn is not the assistant's"),
        (talk("understanding", "a", " \n"), "empty answer"),
        (talk("understanding", "", "b"), "empty question"),
        (talk("understanding", "<image>a", "b"), "number of placeholders is not the number of images"),
        (talk("understanding", "a", "b", images=(A,)), "number of placeholders is not the number of images"),
        (talk("generation", "a<image_gen>", "b", images=(A,)), "<image_gen> in the user's turn"),
        (talk("understanding", "a", "b<image>", images=(A,)), "<image> in the assistant's turn"),
        (talk("generation", "a", "b"), "generation without <image_gen>"),
        (talk("editing", "a", "<image_gen>", images=(A,)), "editing without <image>"),
        (talk("understanding", "a", "<image_gen>", images=(A,)), "understanding with <image_gen>"),
        (talk("generation", "<image>", "<image_gen>", images=(A, B)), "generation with <image> and <image_gen>"),
    ],
)
def test_bad_records(record, reason):
    assert problem(record, Limit()) == reason
    with pytest.raises(BadRecord, match=reason[:10]):
        checked(record, Limit())


def test_the_limit_counts_all_turns_in_its_own_unit():
    record = talk("understanding", "one two three", "four five")
    assert problem(record, Limit(22)) is None
    assert problem(record, Limit(21)) == "longer than 21 characters"
    words = Limit(4, "tokens", lambda text: len(text.split()))
    assert problem(record, words) == "longer than 4 tokens"
    assert problem(record, replace(words, longest=5)) is None


def test_loaded_images_come_in_order():
    first, second = InRecord(png(1, (3, 5))), InRecord(png(2, (7, 2)))
    record, images = loaded(replace(GOOD[4], images=(first, second)))
    assert [image.size for image in images] == [(3, 5), (7, 2)] and record.images == (first, second)
    with pytest.raises(BadRecord, match="more than 20 pixels"):
        loaded(replace(GOOD[2], images=(InRecord(png(0, (7, 3))),)), max_pixels=20)


text = st.text(alphabet=st.sampled_from("a <>_imageg\n"), max_size=12)
marked = st.lists(st.one_of(st.sampled_from([SHOWN, DRAWN]), text), max_size=8)


@given(marked)
def test_pieces_lose_nothing_and_keep_placeholders_apart(parts):
    whole = "".join(parts)
    assert "".join(pieces(whole)) == whole
    found = placeholders(whole)
    assert (found.count(SHOWN), found.count(DRAWN)) == (whole.count(SHOWN), whole.count(DRAWN))
    for piece in pieces(whole):
        assert piece and (piece in (SHOWN, DRAWN) or not (SHOWN in piece or DRAWN in piece))


turn = st.lists(st.one_of(st.just("mark"), st.text(alphabet="abc \n", max_size=5)), min_size=1, max_size=4)


@given(st.lists(st.tuples(turn, turn), min_size=1, max_size=3), st.integers(-1, 1))
def test_only_as_many_images_as_placeholders_are_right(turns, more):
    texts = ["".join(part.replace("mark", SHOWN) for part in question) + "?" for question, _ in turns]
    answers = ["".join(part.replace("mark", DRAWN) for part in answer) + "!" for _, answer in turns]
    marks = sum(text.count(SHOWN) for text in texts), sum(text.count(DRAWN) for text in answers)
    task = "editing" if all(marks) else "generation" if marks[1] else "understanding"
    said = [text for pair in zip(texts, answers, strict=True) for text in pair]
    images = max(0, sum(marks) + more)
    found = problem(talk(task, *said, images=(A,) * images), Limit())
    expected = None if images == sum(marks) else "number of placeholders is not the number of images"
    assert found == expected
