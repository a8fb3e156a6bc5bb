"""Dialogues extracted from a model's reply, and every reason for rejecting one."""

import pytest

from vargpt_rl.data.instruct.banks import bank
from vargpt_rl.data.instruct.dialogue import Unusable
from vargpt_rl.data.instruct.screening import fault, kept, parse

CAPTION = "two brown horses beside a wooden fence"
PROMPT = "Please draw two brown horses beside a wooden fence."
ANSWER = "Here is the picture of two brown horses at a fence of wood."
SEEDS = ("Can you draw ... and frame it?", "Here's ...")


def test_a_good_dialogue_passes():
    assert fault(PROMPT, ANSWER, CAPTION, SEEDS) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I'm sorry, I can't draw two brown horses beside a wooden fence.", "refusal"),
        ("As an AI, I have no picture of two brown horses beside a wooden fence.", "refusal"),
        ("Can you draw and frame it?", "repeats a seed"),
        ("Can you draw ... and frame it? Two brown horses beside a wooden fence.", "repeats a seed"),
        ("Here is the picture of [two brown horses beside a wooden fence].", "placeholder"),
        ("Here is two brown horses beside a wooden fence. <image_gen>", "placeholder"),
        ("Here is the caption, two brown horses beside a wooden fence.", "placeholder"),
        ("Here are two brown horses beside a wooden fence \N{HORSE}.", "wrong characters"),
        ("Here are two brown horses 两匹棕色的马 beside a wooden fence.", "wrong characters"),
        ("Aquí hay un dibujo: two brown horses, wooden fence.", "not English"),
        ("Brown horses.", "not English"),
        ("The horses.", "too short"),
        (f"{ANSWER} " + "It is very pretty. " * 20, "too long"),
        ("Here is the picture of a fence.", "caption content lost"),
        (PROMPT.upper(), "answer repeats the prompt"),
    ],
)
def test_each_reason(text, reason):
    assert fault(PROMPT, text, CAPTION, SEEDS) == reason
    if reason != "answer repeats the prompt":
        assert fault(text, ANSWER, CAPTION, SEEDS) == reason


def test_what_the_caption_has_is_allowed():
    caption = "a sign that says 猫 [open] \N{CAT FACE}, unfortunately upside down"
    assert fault(f"Please show {caption}.", f"Here is {caption}.", caption, SEEDS) is None
    long = "many colorful houses " * 40
    assert fault(f"Please show {long}.", f"Here is {long}.", long, SEEDS) is None


def test_excitement_is_no_refusal():
    assert fault(f"I can't wait to see {CAPTION}!", ANSWER, CAPTION, SEEDS) is None


def test_content_is_found_in_other_inflections():
    assert kept("a boy running with boxes", "The boy runs, a box in his hand") == 1
    assert kept("three red cars", "some red things") == 1 / 3
    assert kept("one of them", "nothing") < 1
    assert kept("in the", "nothing") == 1


@pytest.mark.parametrize("before", ["", "Sure!\n```json\n", "<think>{maybe} so</think>"])
def test_json_is_found_in_a_reply(before):
    assert parse(before + '{"prompt": "a  b", "answer": "c\\nd’s"}\n```') == ("a b", "c d's")


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("Please draw a fox. Here is a fox.", "reply is not JSON"),
        ('{"prompt": "a"', "reply is not JSON"),
        ('{"prompt": "a}', "reply is not JSON"),
        ('{"prompt": 1' + "0" * 5000 + "}", "reply is not JSON"),
        ("I’m unable to do that.", "refusal"),
        ('{"prompt": "a"}', "reply without prompt or answer"),
        ('{"prompt": "a", "answer": " "}', "reply without prompt or answer"),
        ('{"prompt": "a", "answer": ["b"]}', "reply without prompt or answer"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "reply is not JSON"),
    ],
)
def test_other_replies_have_a_reason(reply, reason):
    with pytest.raises(Unusable) as fault:
        parse(reply)
    assert fault.value.reason == reason


def test_the_examples_would_pass_themselves():
    llm = bank("llm")
    for example in llm["examples"]:
        seeds = (example["prompt_seed"], example["answer_seed"])
        assert fault(example["prompt"], example["answer"], example["caption"], seeds) is None, example
        assert all(example[f"{kind}_seed"] in llm[f"{kind}_seeds"] for kind in ("prompt", "caption", "answer"))
    for kind in ("prompt", "caption", "answer"):
        assert len(set(llm[f"{kind}_seeds"])) == len(llm[f"{kind}_seeds"])
    assert all(isinstance(entry, str) for entry in [*llm["english_words"], *llm["function_words"]])
