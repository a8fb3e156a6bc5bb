"""The questions benchmark: accepted answers, MME's pairs, resuming, and bad lines."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vargpt_rl.evaluate import evaluated_model
from vargpt_rl.evaluate.questions import is_right, mme_scores, plain, score_answers

ROWS = [
    {"image": "a.png", "question": "Is there a dog?", "answer": "Yes", "category": "existence"},
    {"image": "a.png", "question": "Is there a cat?", "answer": "No", "category": "existence"},
    {"image": "deeper/b.png", "question": "Is there a pig?", "answer": "yes", "category": "existence"},
    {"image": "deeper/b.png", "question": "Is there a cow?", "answer": "no", "category": "existence"},
    {"image": "a.png", "question": "Is it two?", "answer": "no", "category": "count"},
    {"image": "a.png", "question": "What colour?", "answer": ["dark red", "red"]},
]


@pytest.fixture
def arguments(tmp_path):
    (tmp_path / "images/deeper").mkdir(parents=True)
    for name, colour in (("a.png", "red"), ("deeper/b.png", "blue")):
        Image.new("RGB", (56, 56), colour).save(tmp_path / "images" / name)
    write(tmp_path / "questions.jsonl", ROWS)
    return ["benchmark=questions", f"questions={tmp_path / 'questions.jsonl'}", f"images={tmp_path / 'images'}"]


def write(path, rows) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


@pytest.fixture
def said(monkeypatch):
    """Answers used instead of the model's, by question, and the questions asked, with the image's colour."""
    words, asked = {}, []

    def answers(engine, questions, max_tokens):
        asked.extend((text, images[0].getpixel((0, 0)), max_tokens) for text, images in questions)
        return [words[text] for text, _ in questions]

    monkeypatch.setattr(evaluated_model, "answers", answers)
    monkeypatch.setattr(evaluated_model, "load", lambda *_: (None, None))
    return words, asked


def test_scores_answers_and_asks_once(command, arguments, said, result):
    words, asked = said
    words |= {"Is there a dog?": "Yes, there is.", "Is there a cat?": "no", "Is there a pig?": "yes",
              "Is there a cow?": "Nothing is there", "Is it two?": "No.", "What colour?": "Dark  red!"}  # fmt: skip
    assert command(*arguments, "max_tokens=7") == 0
    red, blue = (255, 0, 0), (0, 0, 255)
    assert asked == [(row["question"], blue if row["image"] == "deeper/b.png" else red, 7) for row in ROWS], (
        "every question is asked about its own image"
    )
    row = result("questions")
    # existence: 3 of 4 right, one of two images wholly; count: one question only, no pair.
    assert row["metrics"] == pytest.approx({"accuracy": 5 / 6, "yes_no_accuracy": 4 / 5, "mme": 75 + 50})
    assert row["details"]["by_category"] == pytest.approx({"existence": 0.75, "count": 1.0, "": 1.0})
    assert row["details"]["mme_by_category"] == {"existence": 125.0}
    counts = {"questions": 6, "yes_no_questions": 5, "unpaired_images": 1, "unanswered": 0, "bad_questions": 0}
    assert row["counts"] == counts
    assert command(*arguments, "max_tokens=7") == 0
    assert len(asked) == len(ROWS), "nothing is asked again"


@pytest.mark.parametrize(
    ("answer", "words", "right"),
    [
        ("yes", "Yes.", True),
        ("yes", "yes it is", True),
        ("yes", "yesterday", False),
        ("no", "not at all", False),
        ("no", "", False),
        ("red", "it is red", False),
        ("red", "RED.", True),
        ("3.5", "3.5", True),
        (["two", "2"], "2", True),
        (["two", "2"], "two of them", False),
        (["yes", "yeah"], "yes it is", False),
    ],
)
def test_accepted_answers(answer, words, right):
    assert is_right({"answer": answer}, words) is right


@given(st.text())
def test_plain_is_idempotent(words):
    assert plain(plain(words)) == plain(words) == plain(f"  {words}! ")


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 3), st.booleans()), min_size=1, max_size=20))
def test_mme_scores_follow_their_definition(answers):
    rows = [({"category": c, "image": f"{i}.png", "question": "?", "answer": "yes"}, right) for c, i, right in answers]
    scores, unpaired = mme_scores(rows)
    groups = {(c, i): [right for k, n, right in answers if (k, n) == (c, i)] for c, i, _ in answers}
    pairs = {key: own for key, own in groups.items() if len(own) == 2}
    assert unpaired == len(groups) - len(pairs)
    assert set(scores) == {c for c, _ in pairs}
    for category, score in scores.items():
        own = [pair for (c, _), pair in pairs.items() if c == category]
        right = [right for pair in own for right in pair]
        both = [sum(pair) == 2 for pair in own]
        assert score == pytest.approx(100 * sum(right) / len(right) + 100 * sum(both) / len(both))


def test_no_yes_no_accuracy_without_yes_no_questions():
    scores = score_answers([({"image": "a", "question": "?", "answer": "red"}, "red")])
    assert scores.metrics == {"accuracy": 1.0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image": "../a.png"}, '"image" is outside the image folder'),
        ({"image": "/a.png"}, '"image" is outside the image folder'),
        ({"image": "c.png"}, "image not found"),
        ({"question": ""}, '"question" is not text or is empty'),
        ({"answer": 3}, '"answer" is not text or a list of texts'),
        ({"answer": []}, '"answer" is not text or a list of texts'),
        ({"answer": ["?"]}, '"answer" is not text or a list of texts'),
        ({"category": 3}, '"category" is not text'),
        ("not JSON", "not JSON: Expecting value"),
    ],
)
def test_quarantines_bad_lines(command, arguments, said, tmp_path, result, change, reason):
    bad = change if isinstance(change, str) else ROWS[0] | change
    write(tmp_path / "questions.jsonl", [bad, *ROWS[1:]])
    said[0].update({row["question"]: "yes" for row in ROWS})
    assert command(*arguments, "max_bad_fraction=0.2") == 0
    assert result("questions")["counts"]["bad_questions"] == 1 and len(said[1]) == 5
    (bad_line,) = map(json.loads, (tmp_path / "out/questions/quarantine.jsonl").read_text().splitlines())
    assert (bad_line["source"], bad_line["reason"]) == (f"{tmp_path / 'questions.jsonl'}:1", reason)


def test_unreadable_image_loses_only_its_questions(command, arguments, said, tmp_path, result, capsys):
    (tmp_path / "images/deeper/b.png").write_bytes(b"no image")
    said[0].update({row["question"]: "yes" for row in ROWS})
    assert command(*arguments) == 2
    assert "2 of 6 records are bad" in capsys.readouterr().err
    assert command(*arguments, "max_bad_fraction=0.4") == 0
    assert result("questions")["counts"]["unanswered"] == 2
    assert result("questions")["counts"]["questions"] == 4


def test_missing_inputs_fail(command, arguments, tmp_path, capsys):
    for wrong, said in (
        ([*arguments[:2], "images=nowhere"], "images=nowhere: expected a folder of images"),
        ([arguments[0], "questions=nowhere.jsonl", arguments[2]], "questions=nowhere.jsonl: no such file"),
        (arguments[:2], "images is not given: benchmark=questions needs images=..."),
    ):
        assert command(*wrong) == 2
        assert capsys.readouterr().err == f"error: {said}\n"
    write(tmp_path / "questions.jsonl", ["{}"])
    assert command(*arguments) == 2
    assert (
        f"error: questions={tmp_path / 'questions.jsonl'}: expected at least one usable line, all 1 are bad"
        in capsys.readouterr().err
    )
