"""Text decoded from a model's tokens, and the transformers engine against the library's greedy search."""

import torch
from PIL import Image

from vargpt_rl.model.prompt import REPLY
from vargpt_rl.text.engine import TextRequest, answers, replies
from vargpt_rl.text.transformers_engine import TransformersEngine

REQUESTS = [
    TextRequest("What colour is the square?", [Image.new("RGB", (64, 64), "red")]),
    TextRequest("two small blue squares above a large green triangle"),
    TextRequest("How many?", [Image.new("RGB", (48, 96), "blue")]),
]


class Scripted:
    """An engine that says given tokens, and notes what it was told to stop at."""

    def __init__(self, chat, *rows):
        self.chat, self.rows = chat, rows

    def write(self, requests, max_tokens, stops):
        self.stops = stops
        return [list(row[:max_tokens]) for row in self.rows]


def test_a_reply_is_what_stands_before_the_image(chat):
    start, words = chat.config.image_gen_start_token_id, chat.text(REPLY)
    odd = [*chat.text(" two\n"), start]
    engine = Scripted(chat, [*words, start], [start], odd, [*words, chat.im_end], words, [*words[:3], start, *words])
    assert replies(engine, ["a"] * 6, 40) == [REPLY, "", " two\n", None, None, None]
    special = {token for token in range(len(chat.tokenizer)) if token in chat.tokenizer.all_special_ids}
    assert special <= set(engine.stops), "no special token can get into a reply"


def test_answers_are_words(chat):
    engine = Scripted(chat, [*chat.text(" red\n"), chat.im_end], [chat.im_end], chat.text("a star"))
    assert answers(engine, REQUESTS, 8) == ["red", "", "a star"]
    assert engine.stops == [chat.im_end]


def alone(model, chat, request, count):
    """Greedy tokens and the first token's log-probabilities, by teacher forcing without a cache."""
    seen = chat.vision_inputs(request.images) if request.images else None
    ids = chat.question(request.text, seen.image_grid_thw if seen else None)
    written, first = [], None
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids + written]), **(seen._asdict() if seen else {})).logits[0, -1]
        first = logits.log_softmax(-1) if first is None else first
        written.append(int(logits.argmax()))
    return written, first


def test_transformers_writes_the_likeliest_tokens_whatever_the_neighbours(model, chat):
    engine = TransformersEngine(model, chat)
    expected = [alone(model, chat, request, 6) for request in REQUESTS]
    assert engine.write(REQUESTS, 6, []) == [written for written, _ in expected]
    assert len({tuple(written) for written, _ in expected}) > 1
    tokens = [5, 40, 41]
    # 1e-4: fp32 sums of a padded batch and of a single row
    torch.testing.assert_close(
        torch.tensor(engine.log_probs(REQUESTS, tokens)),
        torch.stack([first[tokens] for _, first in expected]),
        rtol=0,
        atol=1e-4,
    )


def test_writing_ends_with_the_first_stop(model, chat):
    engine = TransformersEngine(model, chat)
    free = engine.write(REQUESTS, 6, [])
    stop = free[0][2]
    for row, whole in zip(engine.write(REQUESTS, 6, [stop]), free, strict=True):
        assert row == (whole[: whole.index(stop) + 1] if stop in whole else whole)


def test_a_checkpoints_own_repetition_penalty_does_not_count(model, chat):
    engine = TransformersEngine(model, chat)
    before = engine.write(REQUESTS, 12, [])
    model.generation_config.repetition_penalty = 5.0
    try:
        assert engine.write(REQUESTS, 12, []) == before
    finally:
        model.generation_config.repetition_penalty = 1.0
