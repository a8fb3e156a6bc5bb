"""The chat markup: what is marked up, what is learned, how rows are padded, and how images are read."""

import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.helpers.tiny import SPECIAL_TOKENS
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.prompt import IGNORED, SYSTEM, ChatFormat, ImageToDraw, ShownImage


@pytest.fixture(scope="module")
def special(chat):
    return set(chat.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)))


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_special_tokens_that_a_user_writes_stay_text(chat, special, token):
    written = f"a {token} circle"
    assert special.isdisjoint(chat.text(written))
    assert chat.tokenizer.decode(chat.text(written)) == written
    clean, attempted = chat.question("a circle"), chat.question(written)
    assert [i for i in clean if i in special] == [i for i in attempted if i in special]


def test_a_question_is_the_chat_markup(chat):
    markup = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    assert chat.tokenizer.decode(chat.question("How many?")) == markup


def test_a_later_turn_of_the_user_has_no_system_turn(chat):
    assert chat.question("How many?") == chat.system() + chat.user("How many?")
    markup = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    assert chat.tokenizer.decode(chat.user("How many?")) == markup


def test_an_answer_is_learned_with_its_end_and_nothing_else(chat):
    ids, labels = chat.answered("How many circles?", "three")
    question = chat.question("How many circles?")
    assert ids == question + chat.text("three") + [chat.im_end]
    assert labels == [IGNORED] * len(question) + ids[len(question) :]


def test_a_drawing_is_the_prompt_the_image_tokens_and_the_closing(chat):
    config = chat.config
    ids, labels = chat.drawn("a red circle", "Here:", 21)
    prompt = chat.drawing_prompt("a red circle", "Here:")
    closing = [config.image_gen_end_token_id, chat.im_end]
    assert ids == prompt + [config.image_gen_pad_token_id] * 21 + closing
    assert prompt[-1] == config.image_gen_start_token_id
    learned = [*chat.text("Here:"), config.image_gen_start_token_id, *closing]
    assert [label for label in labels if label != IGNORED] == learned
    assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
    assert config.image_gen_pad_token_id not in labels


def test_a_conversation_has_images_where_they_are_shown_and_drawn(chat):
    turns = [
        ("user", ["Mix ", ShownImage(4), " and ", ShownImage(1), "."]),
        ("assistant", ["One:", ImageToDraw(3), "two:", ImageToDraw(3), "both."]),
        ("user", ["Thanks."]),
        ("assistant", [ImageToDraw(3)]),
    ]
    ids, labels = chat.encode(turns)
    seen = [f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in (4, 1)]
    drawn = f"<|image_gen_start|>{'<|image_gen_pad|>' * 3}<|image_gen_end|>"
    replies = f"One:{drawn}two:{drawn}both.<|im_end|>", f"{drawn}<|im_end|>"
    assert chat.tokenizer.decode(ids) == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nMix {seen[0]} and {seen[1]}.<|im_end|>\n"
        f"<|im_start|>assistant\n{replies[0]}\n<|im_start|>user\nThanks.<|im_end|>\n<|im_start|>assistant\n{replies[1]}"
    )
    assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
    learned = chat.tokenizer.decode([label for label in labels if label != IGNORED])
    assert learned == "".join(replies).replace("<|image_gen_pad|>", "")


def test_shown_images_have_at_most_so_many_pixels(checkpoint):
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 140 * 140})
    chat = ChatFormat(str(checkpoint), Vargpt.config_class.from_pretrained(checkpoint))
    chat.image_processor = processor
    wide = Image.effect_noise((300, 100), 50).convert("RGB")
    for limit, bound in ((None, 140 * 140), (10**9, 140 * 140), (56 * 56, 56 * 56), (28 * 28 - 1, 28 * 28)):
        vision = chat.vision_inputs([wide], limit)
        assert vision.image_grid_thw.prod() * 14**2 <= bound
        assert vision.image_grid_thw[0, 2] >= vision.image_grid_thw[0, 1]
        assert len(vision.pixel_values) == vision.image_grid_thw.prod()
    assert torch.equal(chat.vision_inputs([wide]).pixel_values, chat.vision_inputs([wide], 10**9).pixel_values)


def test_understood_images_come_first_in_the_users_turn_with_their_features(chat):
    vision = chat.vision_inputs([Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")])
    assert vision.image_grid_thw.dtype == torch.int64
    assert len(vision.pixel_values) == vision.image_grid_thw.prod(1).sum()
    ids = chat.question("What?", vision.image_grid_thw)
    features = vision.image_grid_thw.prod(1) // 4  # merged two by two
    assert ids.count(chat.config.image_token_id) == features.sum()
    start = ids.index(chat.config.vision_start_token_id)
    end = start + 1 + int(features[0])
    assert ids[start + 1 : end] == [chat.config.image_token_id] * int(features[0])
    assert ids[end : end + 2] == [chat.config.vision_end_token_id, chat.config.vision_start_token_id]
    plain = chat.question("What?")
    assert ids[:start] == plain[:start], "after the role"
    without = [i for i in ids if i not in (chat.config.image_token_id, *ids[end : end + 2])]
    assert without == plain


def test_rows_are_padded_on_either_side(chat):
    rows = [[1, 2, 3], [4]]
    pad = chat.tokenizer.pad_token_id
    assert chat.pad(rows, "right").tolist() == [[1, 2, 3], [4, pad, pad]]
    assert chat.pad(rows, "left").tolist() == [[1, 2, 3], [pad, pad, 4]]
    assert chat.pad(rows, "right", value=IGNORED, multiple=4).tolist() == [[1, 2, 3, -100], [4, -100, -100, -100]]
    assert chat.pad(rows, "left", value=0, multiple=4).tolist() == [[0, 1, 2, 3], [0, 0, 0, 4]]
    assert chat.pad([[1] * 8], "right", multiple=8).shape == (1, 8)
