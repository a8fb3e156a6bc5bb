"""Greedy answers do not depend on the rest of the batch."""

import pytest
import torch
from PIL import Image

from vargpt_rl.text.engine import TextRequest, answers
from vargpt_rl.text.transformers_engine import TransformersEngine

RED, BLUE, WIDE = (
    Image.new("RGB", size, colour) for size, colour in (((56, 56), "red"), ((56, 56), "blue"), ((112, 28), "green"))
)
QUESTIONS = [
    TextRequest("What colour is the square?", [RED]),
    TextRequest("How many?"),
    TextRequest("Which of the two is a circle, and which is a star?", [WIDE, BLUE]),
    TextRequest("What colour is the square?", [BLUE]),
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
def test_batched_answers_equal_single_ones(model, chat, tokens):
    engine = TransformersEngine(model, chat)
    together = answers(engine, QUESTIONS, tokens)
    assert together == [likeliest(model, chat, tokens, *question) for question in QUESTIONS]
    assert len(set(together)) > 1, "answers depend on questions and images, or this test compares constants"
    assert answers(engine, QUESTIONS[::-1], tokens) == together[::-1]
