"""Records as training batches: what is in them, and that a stream that is resumed gives the very same."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.streams import COUNT, TASKS, corpus_of, encoded_image, feed_of, write_sources
from tests.helpers.tiny import BITS, V1_SIDES, Patches
from vargpt_rl.data.batches import Row, SftCollator
from vargpt_rl.data.images import random_crop
from vargpt_rl.data.quarantine import BadRecord
from vargpt_rl.data.records.corpus import Corpus, check_conversation, drawing, question
from vargpt_rl.data.records.images import InRecord, content_sha256
from vargpt_rl.data.records.schema import Message, RecordConversation
from vargpt_rl.data.records.sources import RecordSource
from vargpt_rl.data.records.stream import Admit, Cached, Encode, EncodedConversation, MakeBatch, modality, task_of
from vargpt_rl.data.samples import ImageQuestion, Prompt, Record
from vargpt_rl.data.sources import is_held_out
from vargpt_rl.model.prompt import IGNORED
from vargpt_rl.model.scales import schedule_for, token_count

TOKENS = token_count(schedule_for(64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("feed")


@pytest.fixture(scope="module")
def sources(folder):
    return write_sources(folder / "data")


class Cache:
    """Stands in for a feature cache: crop n of any image that is not missing is n + 1 everywhere."""

    crops = 3

    def __init__(self, missing: set[tuple[str, int]] = frozenset()):
        self.missing = missing

    def __contains__(self, item: tuple[str, int]) -> bool:
        return item not in self.missing

    def get(self, content: str, crop: int) -> np.ndarray:
        assert 0 <= crop < self.crops and len(content) == 64
        return np.full((BITS, 4, 4), crop + 1, np.float16)


def talk(task: str, *texts: str, images: tuple = ()) -> RecordConversation:
    messages = tuple(Message(("user", "assistant")[turn % 2], text) for turn, text in enumerate(texts))
    return RecordConversation("r", "test", task, messages, images)


def shown(seed: int, size: tuple[int, int] = (90, 70)) -> InRecord:
    return InRecord(encoded_image(seed, size))


def batches(chat, feed, count: int, rank: int = 0, ranks: int = 1, seed: int = 0) -> list[dict]:
    return list(islice(feed.loader(feed.mixture(chat, 4, seed, rank, ranks), seed), count))


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# One conversation


def test_images_are_encoded_where_they_stand(chat):
    record = talk(
        "editing", "Mix <image> with <image>!", "Once<image_gen>twice<image_gen>", "thanks", "ok<image_gen>.",
        images=(shown(1), shown(2, (56, 112)), shown(3), shown(4), shown(5)),
    )  # fmt: skip
    sample = Encode(chat, 64, 1000, 56 * 56)(record)
    ids, config = sample.text.ids, chat.config
    grids = sample.vision.image_grid_thw
    assert (len(grids) == 2 and grids[1, 1] < grids[1, 2]) or grids[1, 1] > grids[1, 2], "each keeps its shape"
    assert ids.count(config.image_token_id) == int(grids.prod(1).sum()) // 4
    assert (grids.prod(1) * 14 * 14 <= 56 * 56).all()
    assert ids.count(config.image_gen_pad_token_id) == 3 * TOKENS
    plain = chat.tokenizer.decode([i for i in ids if i not in (config.image_gen_pad_token_id, config.image_token_id)])
    seen, drawn = "<|vision_start|><|vision_end|>", "<|image_gen_start|><|image_gen_end|>"
    assert f"user\nMix {seen} with {seen}!<|im_end|>\n<|im_start|>assistant\nOnce{drawn}twice{drawn}<|im_end|>" in plain
    assert plain.endswith(f"user\nthanks<|im_end|>\n<|im_start|>assistant\nok{drawn}.<|im_end|>")
    learned = chat.tokenizer.decode([label for label in sample.text.labels if label != IGNORED])
    assert learned == f"Once{drawn}twice{drawn}<|im_end|>ok{drawn}.<|im_end|>"
    assert [image.getpixel((0, 0)) for image in sample.drawn] == [
        Image.open(shown(seed).open()).getpixel((0, 0)) for seed in (3, 4, 5)
    ]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (talk("understanding", "a" * 2000, "b"), "row of more than 400 tokens"),
        (talk("generation", "a", "<image_gen>" * 5, images=(shown(1),) * 5), "row of more than 100 tokens"),
        (talk("generation", "a", "<image_gen>", images=(InRecord(b"none"),)), "image of no known kind"),
        (talk("understanding", "<image>?", "b", images=(InRecord(encoded_image(1)[:99]),)), "image is unreadable"),
        (talk("understanding", "<image>?", "b", images=(shown(1, (1, 300)),)), "image cannot be shown: absolute"),
    ],
)
def test_what_cannot_be_a_row_says_why(chat, record, reason):
    limit = 100 if record.task == "generation" else 400
    with pytest.raises(BadRecord, match=reason):
        Encode(chat, 64, limit, 56 * 56)(record)


def test_sources_are_of_one_task_and_held_out_drawings_are_left_out():
    records = {task: replace(talk(task, "a", "b")) for task in ("generation", "editing", "understanding")}
    admitted = {"generation": {"generation"}, "editing": {"editing", "generation"}, "understanding": {"understanding"}}
    for wanted, tasks in admitted.items():
        for task, record in records.items():
            if task in tasks:
                assert Admit(wanted, 0.0)(record) is record
            else:
                with pytest.raises(BadRecord, match=f"{task} record in a source of {wanted}"):
                    Admit(wanted, 0.0)(record)
    for task, record in records.items():
        many = [replace(record, id=str(number)) for number in range(200)]
        kept = [record for record in many if Admit(task, 0.5)(record)]
        assert kept == [one for one in many if task == "understanding" or not is_held_out(one.id, 0.5)]
        assert task == "understanding" or 60 < len(kept) < 140
    assert [modality(task) for task in records] == ["generation", "generation", "understanding"]


def test_features_come_from_the_cache_if_there_is_one(chat):
    record = talk("generation", "a", "<image_gen><image_gen>", images=(shown(1), shown(2)))
    contents = [content_sha256(image) for image in record.images]
    cache = Cache({(contents[0], 0), (contents[0], 2)})
    sample = Encode(chat, 64, 400, 56 * 56, cache)(record)
    assert sample.drawn == (Cached(contents[0], (1,)), Cached(contents[1], (0, 1, 2)))
    make, found = MakeBatch(SftCollator(chat), 64, cache), set()
    for seed in range(20):
        features = make([sample], np.random.default_rng(seed))["features"]
        assert features.dtype == torch.float16 and features.shape == (2, BITS, 4, 4)
        found.add(tuple(features[:, 0, 0, 0].tolist()))
    assert found == {(2.0, 1.0), (2.0, 2.0), (2.0, 3.0)}, "any crop that there is"
    with pytest.raises(BadRecord, match="not in the feature cache"):
        Encode(chat, 64, 400, 56 * 56, Cache({(contents[0], n) for n in range(3)}))(record)


def test_crops_are_the_batchs_own(chat):
    record = talk("generation", "a", "<image_gen><image_gen>", images=(shown(1), shown(2)))
    sample = Encode(chat, 64, 400, 56 * 56)(record)
    assert isinstance(sample, EncodedConversation)
    make = MakeBatch(SftCollator(chat), 64)
    batch = make([sample], np.random.default_rng(3))
    rng = np.random.default_rng(3)
    expected = np.stack([np.asarray(random_crop(image, 64, rng)) for image in sample.drawn])
    assert np.array_equal(batch["crops"].numpy(), expected)
    assert not np.array_equal(make([sample], np.random.default_rng(4))["crops"].numpy(), expected)


# Streams


def drawings_of(chat, batch: dict) -> int:
    starts = batch["input_ids"] == chat.config.image_gen_start_token_id
    return int(starts.any(1).sum())


def test_each_micro_batch_has_its_share_of_drawings(chat, folder, sources):
    for share, drawings in ((0.25, 1), (0.5, 2), (1.0, 4)):
        feed = feed_of(folder, sources, drawing_share=share)
        for batch in batches(chat, feed, 12):
            assert drawings_of(chat, batch) == drawings
            starts = (batch["input_ids"] == chat.config.image_gen_start_token_id).sum()
            assert batch["crops"].shape == (starts, 64, 64, 3)
            ends = (batch["labels"] == chat.im_end).sum()  # of turns: packed rows have several
            assert ends >= 4
            assert ("pixel_values" in batch) == (share < 1), "also where it happens to show none"
            if share < 1:
                assert len(batch["pixel_values"]) == batch["image_grid_thw"].prod(1).sum()


def test_every_record_is_read_and_none_that_is_held_out(chat, folder, sources):
    fraction = 0.3
    feed = feed_of(folder, sources, drawing_share=1.0, held_out_fraction=fraction, packs=False)
    words = "".join(
        chat.tokenizer.decode(row) for batch in batches(chat, feed, 100, 0, 1) for row in batch["input_ids"]
    )
    for number in range(COUNT):
        assert (f"Draw number {number}." in words) != is_held_out(f"line-{number}", fraction)
        assert (f"Draw {number}, please." in words) != is_held_out(f"tar-{number}", fraction)
    assert any(is_held_out(f"line-{number}", fraction) for number in range(COUNT))


def test_ranks_share_the_records(chat, folder, sources):
    feed = feed_of(folder, {"lines": sources["lines"]}, drawing_share=1.0)
    feed = replace(feed, tasks={"lines": "generation"})
    found = []
    for rank in (0, 1):
        rows = [row for batch in batches(chat, feed, 30, rank, 2) for row in batch["input_ids"]]
        words = "".join(chat.tokenizer.decode(row) for row in rows)
        found.append({number for number in range(COUNT) if f"Draw number {number}." in words})
    assert not found[0] & found[1] and found[0] | found[1] == set(range(COUNT))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_gives_the_very_batches_that_were_left(chat, folder, sources, workers):
    feed = feed_of(folder, sources, workers=workers)
    stream = feed.loader(feed.mixture(chat, 4, 7, 0, 1), 7)
    items = iter(stream)
    torch.manual_seed(0)
    list(islice(items, 9))
    state = json.loads(json.dumps(stream.state_dict()))
    rest = list(islice(items, 8))
    before = torch.random.get_rng_state()
    resumed = feed.loader(feed.mixture(chat, 4, 7, 0, 1), 7)
    resumed.load_state_dict(state)
    assert all(equal(one, other) for one, other in zip(rest, islice(resumed, 8), strict=True))
    assert torch.equal(torch.random.get_rng_state(), before), "the training noise's generator is left alone"
    assert not equal(rest[0], batches(chat, feed, 1, seed=7)[0])


def test_bad_records_are_set_aside_with_their_reasons(chat, folder, sources, tmp_path):
    rows = Path(sources["questions"].files[0]).read_text().splitlines()
    rows[3] = json.dumps(json.loads(rows[3]) | {"conversations": [{"from": "human", "value": "alone"}]})
    rows[4] = json.dumps(json.loads(rows[4]) | {"image": "nothing.png"})
    rows[5] = rows[5].replace("Say", "Say " * 400)
    (tmp_path / "bad.jsonl").write_text("\n".join(rows))
    questions = replace(sources["questions"], files=[str(tmp_path / "bad.jsonl")])
    feed = feed_of(tmp_path, {"questions": questions}, drawing_share=0.0, max_bad_fraction=0.2, block=COUNT)
    batches(chat, feed, 20)
    written = (tmp_path / "quarantine/questions/shard-0-of-1.jsonl").read_text()
    lines = [json.loads(line) for line in written.splitlines()]
    assert sorted((line["source"].rpartition(":")[2], line["reason"]) for line in lines) == [
        ("4", "last turn is not the assistant's"),
        ("5", "image is missing"),
        ("6", "row of more than 400 tokens"),
    ]
    with pytest.raises(ValueError, match="more than the permitted share of 0.05"):
        batches(chat, replace(feed, max_bad_fraction=0.05, quarantine=tmp_path / "again"), 20)


def test_what_cannot_be_read_is_named_before_anything_is(chat, folder, sources):
    with pytest.raises(ValueError, match="source lines: files: nothing fits"):
        feed = feed_of(folder, {"lines": RecordSource(["nowhere/*.jsonl"])}, drawing_share=1.0)
        feed.mixture(chat, 4, 0, 0, 1)
    with pytest.raises(ValueError, match="0.1 drawings gives 0 of each batch=4"):
        feed_of(folder, sources, drawing_share=0.1).mixture(chat, 4, 0, 0, 1)
    with pytest.raises(ValueError, match="2 understanding samples in each batch: no source"):
        feed_of(folder, {"lines": sources["lines"]}).mixture(chat, 4, 0, 0, 1)
    edits = feed_of(folder, sources, drawing_share=1.0).at(64, 1.0, ("editing",))
    with pytest.raises(ValueError, match="4 generation samples in each batch: no source"):
        edits.mixture(chat, 4, 0, 0, 1)


def test_the_first_record_says_what_a_source_is_of(folder, sources, tmp_path):
    assert {name: task_of(name, source, tmp_path) for name, source in sources.items()} == TASKS
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="source none: no usable record"):
        task_of("none", RecordSource([str(tmp_path / "empty.jsonl")]), tmp_path)
    (tmp_path / "wrong.jsonl").write_text('{"id": "1"}\n' * 40)
    with pytest.raises(ValueError, match='16 of 16 records are bad(.|\n)*"messages" is missing'):
        task_of("wrong", RecordSource([str(tmp_path / "wrong.jsonl")]), tmp_path)


# Images of a data source, by key


@pytest.mark.parametrize("family", ["chat", "v1_chat"])
def test_conversations_of_a_source_train_as_its_examples_do(family, request):
    chat = request.getfixturevalue(family)
    patches, cache = Patches(), Cache()
    side = 64 if family == "chat" else 16 * V1_SIDES[-1]
    features = np.ones((BITS, 4, 4), np.float16)
    plain = Record("0", Prompt("0", "a star", "Here:"), "red")
    edit = Record("1", Prompt("1", "make it blue", "Here:", "red", 56), "blue")
    asked = ImageQuestion("green", "What colour?", "green")
    encode = Encode(chat, side, cache=cache, images_first=True)
    rows = [drawing(plain, patches, side), drawing(edit, patches, side), question(asked, patches, 56)]
    assert [row.task for row in rows] == ["generation", "editing", "understanding"]
    tokens = token_count(chat.config.image_tokenizer_config.schedule_for(side))
    red, green = (chat.vision_inputs([patches.load(colour, 56)]) for colour in ("red", "green"))
    expected = [
        Row(chat.drawn("a star", "Here:", tokens), None, (features,)),
        Row(chat.drawn("make it blue", "Here:", tokens, red.image_grid_thw), red, (features,)),
        Row(chat.answered("What colour?", "green", green.image_grid_thw), green),
    ]
    cache.crops = 1
    make = MakeBatch(SftCollator(chat), side, cache)
    batch = make([encode(check_conversation(row)) for row in rows], np.random.default_rng(0))
    assert equal(batch, SftCollator(chat)(expected))


def test_every_rank_and_worker_reads_a_corpus_however_small(chat, tmp_path):
    stream = corpus_of(tmp_path, np.zeros((2, BITS, 4, 4)), [ImageQuestion("red", "What colour?", "red")], workers=2)
    for rank in range(2):
        for batch in islice(stream.loader(stream.mixture(chat, 4, 0, rank, 2), 0), 4):
            assert len(batch["features"]) == 2 and len(batch["image_grid_thw"]) == 2


def test_a_corpus_is_read_once_before_any_image_comes_twice(chat, tmp_path):
    features = np.arange(10)[:, None, None, None] * np.ones((BITS, 4, 4))
    stream = corpus_of(tmp_path, features)
    mixture = iter(stream.mixture(chat, 5, 0, 0, 1))
    epochs = [[number for _ in range(2) for number in next(mixture)["features"][:, 0, 0, 0].tolist()] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1], "another order each time"


def test_records_of_a_corpus_that_cannot_be_used_are_quarantined(chat, tmp_path):
    stream = corpus_of(tmp_path, np.zeros((8, BITS, 4, 4)), max_bad_fraction=0.3)
    rows = stream.sources["images"].rows
    marked = replace(rows[0], messages=(Message("user", "an <image>"), rows[0].messages[1]))
    unknown = replace(rows[1], images=(replace(rows[1].images[0], key="gone"),))
    stream = replace(stream, sources={"images": Corpus([marked, unknown, *rows[2:]])})
    list(islice(iter(stream.mixture(chat, 6, 0, 0, 1)), 2))
    written = (tmp_path / "quarantine/images/shard-0-of-1.jsonl").read_text().splitlines()
    assert sorted((json.loads(line)["source"], json.loads(line)["reason"]) for line in written) == [
        ("images:1", "number of placeholders is not the number of images"),
        ("images:2", "image is not in the feature cache"),
    ]
