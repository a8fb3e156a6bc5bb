"""The markup of v1: what is marked up, what is learned, and how images are read."""

import pytest
import torch
from PIL import Image

from tests.helpers.tiny import V1_SEEN_SIDE, V1_SPECIAL_TOKENS
from vargpt_rl.model.prompt import IGNORED
from vargpt_rl.model.v1.prompt import SYSTEM


@pytest.mark.parametrize("token", V1_SPECIAL_TOKENS)
def test_special_tokens_that_a_user_writes_stay_text(v1_chat, token):
    special = set(v1_chat.tokenizer.convert_tokens_to_ids(list(V1_SPECIAL_TOKENS)))
    clean, attempted = v1_chat.question("a circle"), v1_chat.question(f"a {token} circle")
    assert [i for i in clean if i in special] == [i for i in attempted if i in special]
    assert token in v1_chat.tokenizer.decode(attempted)


def test_a_conversation_is_vicunas(v1_chat):
    first = v1_chat.question("How many?") + v1_chat.text("three") + v1_chat.closing + v1_chat.user("Why?")
    expected = f"<s>{SYSTEM}USER: How many? ASSISTANT:three</s>USER: Why? ASSISTANT:"
    assert v1_chat.tokenizer.decode(first) == expected


def test_an_answer_is_learned_with_its_end_and_nothing_else(v1_chat):
    ids, labels = v1_chat.answered("How many circles?", "three")
    question = v1_chat.question("How many circles?")
    assert ids == question + v1_chat.text("three") + [v1_chat.tokenizer.eos_token_id]
    assert labels == [IGNORED] * len(question) + ids[len(question) :]


def test_a_drawing_is_the_prompt_the_image_tokens_and_the_closing(v1_chat):
    config = v1_chat.config
    ids, labels = v1_chat.drawn("a red circle", "Here:", 21)
    closing = [config.image_gen_end_token_id, v1_chat.end]
    assert ids == v1_chat.drawing_prompt("a red circle", "Here:") + [config.image_gen_pad_token_id] * 21 + closing
    learned = [*v1_chat.text("Here:"), config.image_gen_start_token_id, *closing]
    assert [label for label in labels if label != IGNORED] == learned


def test_understood_images_stand_before_the_words_with_one_token_a_patch(v1_chat):
    vision = v1_chat.vision_inputs([Image.new("RGB", (64, 40), colour) for colour in ("red", "blue")])
    side = V1_SEEN_SIDE // 14
    assert vision.pixel_values.shape == (2, 3, V1_SEEN_SIDE, V1_SEEN_SIDE)
    assert vision.image_grid_thw.tolist() == [[1, side, side]] * 2
    ids = v1_chat.question("What?", vision.image_grid_thw)
    assert ids.count(v1_chat.config.image_token_id) == 2 * side**2
    words = v1_chat.tokenizer.decode([i for i in ids if i != v1_chat.config.image_token_id])
    assert words == f"<s>{SYSTEM}USER: \n\nWhat? ASSISTANT:"
    none = torch.zeros(0, 3, dtype=torch.long)
    assert v1_chat.question("What?", none) == v1_chat.question("What?")
