"""Batches for supervised and preference training."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.tiny import BITS, tiny_checkpoint
from vargpt_rl.data.batches import MULTIPLE, DrawExample, PairCollator, Row, SftCollator, TextExample
from vargpt_rl.data.samples import Prompt
from vargpt_rl.model.bits import pack
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.prompt import IGNORED, ChatFormat, ImageToDraw
from vargpt_rl.model.scales import schedule_for, token_count

TOKENS = token_count(schedule_for(64))
SCALES = len(schedule_for(64))


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    return ChatFormat(folder, Vargpt.config_class.from_pretrained(folder))


def features(side: int = 64, value: float = 0.0) -> np.ndarray:
    return np.full((BITS, side // 16, side // 16), value, np.float16)


def test_drawings_and_questions_share_a_batch_in_order(chat):
    red, blue = (chat.vision_inputs([Image.new("RGB", (56, 56), colour)]) for colour in ("red", "blue"))
    batch = SftCollator(chat)(
        [
            DrawExample(Prompt("0", "a star", "Here:"), features(value=1.0)),
            TextExample("What colour is the square?", "blue", blue),
            DrawExample(Prompt("1", "Recolour it."), features(value=2.0), red),
        ]
    )
    rows = [
        chat.drawn("a star", "Here:", TOKENS),
        chat.answered("What colour is the square?", "blue", blue.image_grid_thw),
        chat.drawn("Recolour it.", "", TOKENS, red.image_grid_thw),
    ]
    assert batch["input_ids"].shape[1] % MULTIPLE == 0
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
    for b, row in enumerate(rows):
        n = len(row.ids)
        assert batch["input_ids"][b, :n].tolist() == row.ids
        assert batch["labels"][b, :n].tolist() == row.labels
        assert (batch["labels"][b, n:] == IGNORED).all(), "pads are not learned"
        assert batch["attention_mask"][b].tolist() == [1] * n + [0] * (batch["input_ids"].shape[1] - n)
    assert batch["features"].dtype == torch.float16
    assert batch["features"][:, 0, 0, 0].tolist() == [1.0, 2.0]
    assert torch.equal(batch["image_grid_thw"], torch.cat([blue.image_grid_thw, red.image_grid_thw]))
    assert torch.equal(batch["pixel_values"], torch.cat([blue.pixel_values, red.pixel_values]))


def test_a_batch_has_only_what_its_examples_have(chat):
    text = SftCollator(chat)([TextExample("How many circles?", "three")])
    assert text.keys() == {"input_ids", "attention_mask", "labels"}
    drawn = SftCollator(chat)([DrawExample(Prompt("0", "a star"), features())])
    assert drawn.keys() == {"input_ids", "attention_mask", "labels", "features"}


def test_image_tokens_follow_the_size_of_the_features(chat):
    wide = np.zeros((BITS, 4, 8), np.float16)
    batch = SftCollator(chat)([DrawExample(Prompt("0", "a star"), wide)])
    pads = batch["input_ids"] == chat.config.image_gen_pad_token_id
    assert pads.sum() == token_count(schedule_for(64, 128))


def test_drawings_of_two_sizes_do_not_fit_a_batch(chat):
    examples = [DrawExample(Prompt("0", "a star"), features(side)) for side in (64, 32)]
    with pytest.raises(ValueError, match="same shape"):
        SftCollator(chat)(examples)


def text(chat, words: str) -> Row:
    return Row(chat.answered("Say it.", words))


def drawing(chat, images: int, value: float, dtype=np.float16) -> Row:
    parts = [part for _ in range(images) for part in ("Here:", ImageToDraw(TOKENS))]
    shape = (64, 64, 3) if dtype == np.uint8 else (BITS, 4, 4)
    drawn = tuple(np.full(shape, value + i, dtype) for i in range(images))
    return Row(chat.encode([("user", ["Draw."]), ("assistant", parts)]), None, drawn)


def test_drawn_images_are_in_the_order_of_their_places(chat):
    batch = SftCollator(chat)([drawing(chat, 2, 1.0), text(chat, "red"), drawing(chat, 1, 3.0)])
    pads = batch["input_ids"] == chat.config.image_gen_pad_token_id
    assert pads.sum(1).tolist() == [2 * TOKENS, 0, TOKENS]
    assert batch["features"][:, 0, 0, 0].tolist() == [1.0, 2.0, 3.0]
    assert "blocks" not in batch


def test_pixels_stay_pixels(chat):
    batch = SftCollator(chat)([drawing(chat, 2, 7, np.uint8)])
    assert batch["crops"].shape == (2, 64, 64, 3) and batch["crops"].dtype == torch.uint8
    assert batch["crops"][:, 0, 0, 0].tolist() == [7, 8] and "features" not in batch


def test_short_texts_share_rows_that_are_no_wider_than_the_batch(chat):
    words = ["red", "blue " * 30, "green", "yellow"]
    texts = [text(chat, word) for word in words]
    shown = chat.vision_inputs([Image.new("RGB", (56, 56), "red")])
    seen = Row(chat.answered("What?", "red", shown.image_grid_thw), shown)
    batch = SftCollator(chat, packs=True)([texts[0], seen, *texts[1:], drawing(chat, 1, 1.0)])
    alone = SftCollator(chat)([texts[0], seen, *texts[1:], drawing(chat, 1, 1.0)])
    assert batch["input_ids"].shape[1] == alone["input_ids"].shape[1]
    assert len(batch["input_ids"]) < len(alone["input_ids"])
    assert torch.equal(batch["pixel_values"], alone["pixel_values"])
    assert torch.equal((batch["blocks"] > 0).long(), batch["attention_mask"])
    config = chat.config
    assert (batch["blocks"][(batch["input_ids"] == config.image_token_id).any(1)] < 2).all(), "images are alone"
    assert (batch["blocks"][(batch["input_ids"] == config.image_gen_pad_token_id).any(1)] < 2).all()
    found = []
    for ids, labels, blocks in zip(batch["input_ids"], batch["labels"], batch["blocks"], strict=True):
        assert blocks[blocks > 0].diff().min() >= 0
        found += [(ids[blocks == n].tolist(), labels[blocks == n].tolist()) for n in range(1, int(blocks.max()) + 1)]
    rows = [*(row.text for row in texts), seen.text, drawing(chat, 1, 1.0).text]
    assert sorted(found) == sorted((row.ids, row.labels) for row in rows), "each once and whole"


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)

    def pair(i: int) -> dict:
        return {
            "prompt": ("a star", "two small blue squares")[i],
            "reply": "Here:",
            "resolution": 64,
            "chosen_bits": pack(rng.integers(0, 2, (TOKENS, BITS))),
            "rejected_bits": pack(rng.integers(0, 2, (TOKENS, BITS))),
            # not representable in fp32
            "reference_chosen_logp": -100.0 - i - 1e-9,
            "reference_rejected_logp": -200.0 - i - 1e-9,
            "reference_chosen_by_scale": np.arange(SCALES) + 10.0 * i,
            "reference_rejected_by_scale": np.arange(SCALES) + 10.0 * i + 100,
        }

    return [pair(0), pair(1)]


def test_pairs_are_ordered_chosen_then_rejected(chat, pairs):
    batch = PairCollator(chat)(pairs)
    assert batch["bits"].shape == (4, TOKENS, BITS)
    packed = [pair[key] for key in ("chosen_bits", "rejected_bits") for pair in pairs]
    assert [pack(bits_Ld.numpy()) for bits_Ld in batch["bits"]] == packed
    assert torch.equal(batch["input_ids"][:2], batch["input_ids"][2:]), "one prompt a pair"
    for b, pair in enumerate(pairs):
        ids = chat.drawn(pair["prompt"], pair["reply"], TOKENS).ids
        assert batch["input_ids"][b, : len(ids)].tolist() == ids
        assert batch["attention_mask"][b].sum() == len(ids)
    assert batch["ref_by_scale"][:, 0].tolist() == [0.0, 10.0, 100.0, 110.0]
    assert int(batch["resolution"]) == 64


def test_the_completion_mask_is_the_image_tokens(chat, pairs):
    batch = PairCollator(chat)(pairs)
    at_image = batch["input_ids"] == chat.config.image_gen_pad_token_id
    assert torch.equal(batch["completion_mask"].bool(), at_image)
    assert batch["completion_mask"].sum(1).tolist() == [TOKENS] * 4


def test_references_keep_double_precision(chat, pairs):
    batch = PairCollator(chat)(pairs)
    for side in ("chosen", "rejected"):
        assert batch[f"ref_{side}_logps"].dtype == torch.float64
        assert batch[f"ref_{side}_logps"].tolist() == [pair[f"reference_{side}_logp"] for pair in pairs]


def test_bits_of_another_size_are_refused(chat, pairs):
    pairs[0]["resolution"] = 32
    with pytest.raises(ValueError, match="21 bytes, expected 5 for 5 tokens of 8 bits"):
        PairCollator(chat)(pairs)
