"""Text in images, read by the real reader with its real weights."""

import pytest
from PIL import Image, ImageDraw, ImageFont

from rewards.ocr import TextAccuracy, accuracy, asked_text, edit_distance


def sign(text: str, side: int = 192, size: int = 28) -> Image.Image:
    image = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(image).multiline_text((12, side // 3), text, "black", ImageFont.load_default(size))
    return image


def test_text_is_read_and_compared():
    images = [sign("FRESH\nBREAD"), sign("OPEN"), Image.new("RGB", (64, 64), "white"), sign("x")]
    prompts = ['a sign with "fresh bread"', "a door that says 'EXIT'", 'the word "hi"', "a cat"]
    exact, other, nothing, unasked = TextAccuracy()(images, prompts)
    assert exact == 1.0
    assert other == pytest.approx(1 - edit_distance("exit", "open") / 4)
    assert nothing == 0.0 and unasked is None


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('two signs, "Ab c" and "d"', "Ab c d"),
        ("a mug with ‘it’s tea’ on it", "it’s tea"),
        ("«Café» in neon", "Café"),
        ("the cat's toy and the dogs' bowl", ""),
        ("a note: 'don't'", "don't"),
        ("no text", ""),
    ],
)
def test_what_a_prompt_asks_for(prompt, text):
    assert asked_text(prompt) == text


def test_accuracy_is_one_minus_the_normalised_distance():
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "abc") == 3
    assert accuracy("Open", "o p e n") == 1.0
    assert accuracy("abcd", "abxd") == 0.75
    assert accuracy("ab", "abcd") == 0.5
    assert accuracy("ab", "") == 0.0
