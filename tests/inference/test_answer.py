"""Answers are the likeliest words, whatever else is in the batch."""

import pytest
import torch
from PIL import Image

from vargpt_rl.inference.answer import answer

RED, BLUE, WIDE = (
    Image.new("RGB", size, colour) for size, colour in (((56, 56), "red"), ((56, 56), "blue"), ((112, 28), "green"))
)
QUESTIONS = [
    ("What colour is the square?", [RED]),
    ("How many?", []),
    ("Which of the two is a circle, and which is a star?", [WIDE, BLUE]),
    ("What colour is the square?", [BLUE]),
]


@torch.no_grad()
def likeliest(model, chat, tokens, text, images) -> str:
    """One token after another, each from a pass over the whole row."""
    shown = chat.vision_inputs(images) if images else None
    ids = chat.question(text, shown.image_grid_thw if shown else None)
    said = []
    while len(said) < tokens and (not said or said[-1] != chat.im_end):
        ids_BT = torch.tensor([ids + said])
        positions = model.positions(ids_BT, torch.ones_like(ids_BT), shown.image_grid_thw if shown else None)
        vision = shown._asdict() if shown else {}
        said.append(int(model(ids_BT, position_ids=positions, **vision).logits[0, -1].argmax()))
    return chat.tokenizer.decode(said, skip_special_tokens=True).strip()


@pytest.mark.parametrize("tokens", [1, 6])
def test_a_batch_of_any_questions_is_answered_as_one_by_one(model, chat, tokens):
    together = answer(model, chat, QUESTIONS, tokens)
    assert together == [likeliest(model, chat, tokens, *question) for question in QUESTIONS]
    assert len(set(together)) > 1, "answers depend on questions and images, or this test compares constants"
    assert answer(model, chat, QUESTIONS[::-1], tokens) == together[::-1]
