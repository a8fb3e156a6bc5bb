"""What supervised training is fed: corpus folders and balanced batches."""

import json
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from learners.sft import BalancedBatches, Drawings, Questions
from tests.helpers.tiny import Patches, tiny_checkpoint
from vargpt_rl.data.batches import DrawExample, SftCollator, TextExample
from vargpt_rl.data.samples import Prompt
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.prompt import ChatFormat


def corpus(folder, images: int, prompts: int):
    features = np.arange(images * 8, dtype=np.float16).reshape(-1, 2, 2, 2)
    save_file({"features": features}, folder / "features.safetensors")
    rows = [json.dumps({"id": str(i), "text": f"{i} stars", "reply": "Here:"}) for i in range(prompts)]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    return folder


def test_drawings_are_the_images_and_prompts_of_a_folder(tmp_path):
    drawings = Drawings(corpus(tmp_path, 3, 3))
    assert len(drawings) == 3
    example = drawings[1]
    assert isinstance(example, DrawExample)
    assert example.prompt == Prompt("1", "1 stars", "Here:")
    assert example.features.dtype == np.float16
    assert example.features.ravel().tolist() == list(range(8, 16))


def test_a_folder_whose_halves_disagree_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: 3 images for 2 prompts"):
        Drawings(corpus(tmp_path, 3, 2))


def test_drawings_come_with_the_images_that_prompts_show(tmp_path, checkpoint, chat):
    features = np.zeros((2, 2, 2, 2), np.float16)
    save_file({"features": features}, tmp_path / "features.safetensors")
    prompts = [Prompt("0", "make it blue", "Here:", "red", 56), Prompt("1", "a star")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(asdict(prompt)) for prompt in prompts))
    edit, drawing = (Drawings(tmp_path, Patches(), chat)[i] for i in range(2))
    assert [edit.prompt, drawing.prompt] == prompts and drawing.images is None
    red = chat.vision_inputs([Image.new("RGB", (56, 56), "red")])
    assert (edit.images.pixel_values == red.pixel_values).all()
    batch = SftCollator(chat)([edit, drawing])
    assert (batch["input_ids"] == chat.config.image_token_id).sum(1).tolist() == [4, 0], "56 px are 2 x 2 tokens"
    assert len(batch["pixel_values"]) == 16 and len(batch["features"]) == 2


def test_questions_are_about_the_images_of_a_source(tmp_path):
    folder = tiny_checkpoint(tmp_path)
    chat = ChatFormat(folder, Vargpt.config_class.from_pretrained(folder))
    questions = Questions([("red", "What colour?", "red"), ("blue", "?", "blue")], Patches(), chat, 56)
    assert len(questions) == 2
    example = questions[1]
    assert isinstance(example, TextExample)
    assert (example.question, example.answer) == ("?", "blue")
    blue = chat.vision_inputs([Image.new("RGB", (56, 56), "blue")])
    assert (example.images.pixel_values == blue.pixel_values).all()


DRAWINGS, QUESTIONS = [f"d{i}" for i in range(10)], [f"q{i}" for i in range(3)]


@pytest.mark.parametrize(("share", "per_block"), [(0.0, 0), (0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_each_micro_batch_has_the_same_share_of_drawings(share, per_block):
    batches = BalancedBatches(DRAWINGS, QUESTIONS, length=40, micro_batch=4, share=share, seed=0)
    items = [batches[i] for i in range(len(batches))]
    assert len(items) == 40
    for start in range(0, 40, 4):
        assert sum(item[0] == "d" for item in items[start : start + 4]) == per_block


def test_every_item_comes_once_before_any_comes_twice():
    batches = BalancedBatches(DRAWINGS, QUESTIONS, length=40, micro_batch=4, share=0.5, seed=0)
    items = [batches[i] for i in range(40)]
    drawn = [item for item in items if item[0] == "d"]
    assert set(drawn[:10]) == set(drawn[10:]) == set(DRAWINGS)
    assert drawn[:10] != drawn[10:], "another order each time"
    asked = Counter(item for item in items if item[0] == "q")
    assert max(asked.values()) - min(asked.values()) <= 1


def test_the_order_is_the_seeds():
    def order(seed: int) -> list[str]:
        batches = BalancedBatches(DRAWINGS, QUESTIONS, length=20, micro_batch=2, share=0.5, seed=seed)
        return [batches[i] for i in range(20)]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_without_questions_all_are_drawings():
    batches = BalancedBatches(DRAWINGS, None, length=7, micro_batch=4, share=0.5, seed=0)
    assert [batches[i][0] for i in range(len(batches))] == ["d"] * 7
