"""Sentences of the template way: what the bank has, and how captions of all kinds read in it."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vargpt_rl.data.instruct import banks
from vargpt_rl.data.instruct.dialogue import Caption
from vargpt_rl.data.instruct.templates import fill, template_pair, with_article, word

BANK = banks.bank("templates")
NAMES = ("a_picture", "the_picture", "subject")


def pair(text: str, identity: str = "1", seed: int = 0):
    return template_pair(Caption(identity, text, None, "here"), seed)


def test_the_bank_is_large_and_consistent():
    prompts, answers = BANK["prompts"], BANK["answers"]
    assert len(prompts) >= 20 and len(answers) >= 20
    patterns = [*prompts.values(), *answers.values()]
    assert len(set(patterns)) == len(patterns)
    lines = Path(banks.__file__).with_name("templates.yaml").read_text().splitlines()
    assert len([line for line in lines if re.match(r'  [\w-]+: "', line)]) == len(patterns)  # no id twice
    for pattern in patterns:
        assert len(re.findall(r"\{(\w+)\}", pattern)) == 1 and re.search(r"[.?:]$", pattern)
        assert re.search(r"\{(\w+)\}", pattern)[1] in NAMES
    assert all(re.search(r"\{a_picture\}[.?]$", pattern) for pattern in prompts.values())
    words = ("media", "sentence_openers", "finite_verbs", "lowered", "kinds", "kind_openers")
    assert all(isinstance(entry, str) for name in words for entry in BANK[name])  # an unquoted "no" is none


@pytest.mark.parametrize(
    ("caption", "picture", "subject"),
    [
        ("A large volcano in the distance.", "a sketch of a large volcano in the distance", None),
        ("Phillip Fry listening to music", "a sketch of Phillip Fry listening to music", None),
        ("two dogs,", "a sketch of two dogs", None),
        ("a man in a photo of a fox", "a sketch of a man in a photo of a fox", None),
        ("two paintings of a fox", "a sketch of two paintings of a fox", None),
        ("A watercolor painting of a fox.", "a watercolor painting of a fox", "a watercolor painting of a fox"),
        ("Oil painting of a fox", "an oil painting of a fox", "an oil painting of a fox"),
        ("a close-up shot, 4k", "a close-up shot, 4k", "a close-up shot, 4k"),
    ],
)
def test_captions_that_are_phrases_read_well(caption, picture, subject):
    wording = word(caption, "sketch")
    assert fill("Can you make {a_picture}?", wording) == f"Can you make {picture}?"
    subject = subject or picture.removeprefix("a sketch of ")
    assert fill("The image shows {subject}.", wording) == f"The image shows {subject}."


@pytest.mark.parametrize(
    ("caption", "sentence"),
    [
        ("a train is on the tracks", "A train is on the tracks."),
        ("iPhones are here", "iPhones are here."),
        ("This illustration shows a fox.", "This illustration shows a fox."),
        ("A dog. It barks!", "A dog. It barks!"),
        ('a sign saying "Stop!"', 'A sign saying "Stop!"'),
        ("In a forest, a fox", "In a forest, a fox."),
    ],
)
def test_captions_that_are_sentences_follow(caption, sentence):
    wording = word(caption, "sketch")
    assert fill("Can you make {a_picture}?", wording) == f"Can you make a sketch of this? {sentence}"
    assert fill("The image shows {subject}.", wording) == f"The image shows this: {sentence}"


def test_definite_pictures():
    assert fill("{the_picture} is as follows:", word("a fox", "photo")) == "The photo of a fox is as follows:"
    assert (
        fill("{the_picture} is here.", word("An ink drawing of a fox", "photo")) == "The ink drawing of a fox is here."
    )
    assert fill("{the_picture} is here.", word("a fox is red", "photo")) == "The photo of this is here: A fox is red."


@pytest.mark.parametrize(
    "noun", ["an image", "an hour", "a unicorn", "an uninvited guest", "a European", "an 8-bit", "a fox"]
)
def test_articles(noun):
    assert with_article(noun.split(" ", 1)[1]) == noun


words = st.one_of(
    st.sampled_from(["dog,", "photo", "of", "a", "is", "Jane", "two", "painting", "stands", "the", "image", "An"]),
    st.text("abcdefghijklmnopqrstuvwxyzéüABC0189-'", min_size=3, max_size=8).filter(lambda w: w[0].isalpha()),
)
DOUBLED = re.compile(r"[.,!?:;] ?[.,!?:;]|\b(an?|the) (an?|the)\b|of of|  ", re.IGNORECASE)
captions = st.builds(
    lambda start, rest, end: " ".join([start, *rest]).strip(",") + end,
    st.one_of(words, st.sampled_from(["A", "the", "Two", "This is", "In"])),
    st.lists(words, min_size=1, max_size=8),
    st.sampled_from(["", "", ".", "!", "?", '."', ","]),
).filter(lambda caption: not DOUBLED.search(caption))


def content(caption: str) -> str:
    """A caption without the marks around it and the article before it, which may become another one."""
    return re.sub("^an? ", "", caption.strip(" ,;:."), flags=re.IGNORECASE)


@given(captions, st.integers(0, 2**40), st.integers(0, 9))
def test_sentences_have_the_whole_caption_and_nothing_doubled(caption, number, seed):
    made = pair(caption, str(number), seed)
    core = content(caption)
    for text in (made.prompt, made.answer):
        at = text.casefold().find(core.casefold())
        assert at >= 0 and core[1:] in text
        around = f"{text[:at]}\0{text[at + len(core) :]}"  # what is in the caption itself is its own affair
        assert not DOUBLED.search(around)
        assert not DOUBLED.search(text[:at] + core.split()[0])
        assert re.search(r"""[.?!:]"?$""", text) and text[0].isupper()


@given(st.text(min_size=1).map(lambda text: " ".join(text.split())).filter(lambda text: re.search(r"\w", text)))
def test_any_caption_with_a_word_makes_a_dialogue(caption):
    made = pair(caption)
    assert content(caption)[1:] in made.prompt and content(caption)[1:] in made.answer


def test_a_dialogue_depends_on_seed_and_id_alone():
    assert pair("a fox", "7", 1) == pair("a fox", "7", 1)
    assert pair("a cat", "7", 1).made_by == pair("a fox", "7", 1).made_by
    assert len({str(pair("a fox", str(n), 0).made_by) for n in range(200)}) > 150
    assert len({str(pair("a fox", "7", seed).made_by) for seed in range(200)}) > 150


def test_prompt_and_answer_speak_of_the_same_kind_of_picture():
    for number in range(100):
        made = pair("a fox", str(number))
        template = made.made_by["template"]
        assert f" {template['medium']} of a fox" in made.prompt
        if "subject" not in BANK["answers"][template["answer"]]:
            assert f" {template['medium']} of a fox" in made.answer
