"""Pairs that came from files: formats, ties, unusable images, names that lead elsewhere, held-out prompts."""

import io
import json
import os
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, strategies
from PIL import Image

from vargpt_rl.data.own_pairs import OwnPair, PairImages, held_out_prompts, judged, read_own_pairs
from vargpt_rl.data.pair_sources import PairsSource, SourceWithPairs
from vargpt_rl.data.quarantine import Quarantine
from vargpt_rl.data.samples import Prompt
from vargpt_rl.data.sources import ShapesConfig, ShapesSource

COLOURS = ("red", "green", "blue", "yellow")


def encoded(colour, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for colour in COLOURS:
        (tmp_path / "images" / f"{colour}.jpg").write_bytes(encoded(colour, "JPEG"))
    return tmp_path


def read(folder, path="pairs.jsonl", bad=0.0, held_out=0.1):
    images = PairImages(folder / "images", folder / "run/pairs")
    return read_own_pairs(folder / path, images, Quarantine(folder / "quarantine.jsonl"), held_out, bad)


def write(folder, *rows, name="pairs.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def sides(pairs):
    return [(pair.prompt.text, pair.chosen.split("/")[-1], pair.rejected.split("/")[-1]) for pair in pairs.pairs]


def test_json_lines_name_the_winner_or_the_chosen_image(folder):
    images = {"image_0": "red.jpg", "image_1": "blue.jpg"}
    write(
        folder,
        {"prompt": "one", "chosen": "red.jpg", "rejected": "green.jpg"},
        {"prompt": "two", **images, "winner": 1},
        {"prompt": "three", **images, "winner": "tie"},
        {"prompt": "four", **images, "winner": None},
        {"prompt": "five", "chosen": "red.jpg", "rejected": "red.jpg"},
    )
    found = read(folder)
    assert sides(found) == [("one", "red.jpg", "green.jpg"), ("two", "blue.jpg", "red.jpg")]
    assert found.left_out == {"tie": 1, "no label": 1, "same image twice": 1} and found.lines == 5
    assert found.pairs[0].place.endswith("pairs.jsonl:1") and len({pair.id for pair in found.pairs}) == 2


@pytest.mark.parametrize("wrapped", [False, True])
def test_pick_a_pic_brings_its_images_which_are_kept_once(folder, wrapped):
    def image(colour):
        return {"bytes": encoded(colour), "path": None} if wrapped else encoded(colour)

    labels = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
    rows = [
        {
            "caption": f"prompt {i}",
            "jpg_0": image("red"),
            "jpg_1": image(COLOURS[1 + i % 2]),
            "label_0": a,
            "label_1": b,
        }
        | {"has_label": i != 3}
        for i, (a, b) in enumerate(labels)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    found = read(folder, "pairs.parquet")
    assert [pair.prompt.text for pair in found.pairs] == ["prompt 0", "prompt 1"]
    assert found.left_out == {"tie": 1, "no label": 1}
    assert found.pairs[0].chosen == found.pairs[1].rejected, "one image, one key"
    kept = sorted(path.name for path in (folder / "run/pairs").iterdir())
    assert len(kept) == 3 and f"pairs/kept/{kept[0]}" in {found.pairs[0].chosen, *(p.rejected for p in found.pairs)} | {
        p.chosen for p in found.pairs
    }
    loaded = PairImages(folder / "images", folder / "run/pairs").load(found.pairs[0].chosen, 16)
    assert loaded.size == (16, 16) and loaded.getpixel((0, 0)) == (255, 0, 0)


def test_pick_a_pic_may_name_files(folder):
    row = {"caption": "a", "jpg_0": "red.jpg", "jpg_1": "blue.jpg", "label_0": 0, "label_1": 1}
    pq.write_table(pa.Table.from_pylist([row, row | {"caption": "b"}]), folder / "pairs.parquet")
    assert sides(read(folder, "pairs.parquet"))[0] == ("a", "blue.jpg", "red.jpg")


def test_a_ranking_of_hpd_is_all_its_comparisons(folder):
    names = [f"{colour}.jpg" for colour in COLOURS]
    rows = [
        {"prompt": "preferred", "file_path": names[:2], "human_preference": [0, 1], "user_hash": "x"},
        {"prompt": "ranked", "image_path": names, "rank": [2, 1, 3, 3]},
        {
            "prompt": "voted",
            "image_path": names[:2],
            "raw_annotations": [{"rank": [1, 2], "user_hash": u} for u in "ab"] + [{"rank": [2, 1], "user_hash": "c"}],
        },
    ]
    (folder / "train.json").write_text(json.dumps(rows))
    found = read(folder, "train.json")
    assert sides(found)[0] == ("preferred", "green.jpg", "red.jpg")
    assert sides(found)[-1] == ("voted", "red.jpg", "green.jpg")
    ranked = [(chosen, rejected) for text, chosen, rejected in sides(found) if text == "ranked"]
    assert len(ranked) == 5 and ("green.jpg", "red.jpg") in ranked and found.left_out == {"tie": 1}


def test_a_folder_is_all_its_files(folder):
    for number in range(2):
        write(folder, {"prompt": str(number), "chosen": "red.jpg", "rejected": "blue.jpg"}, name=f"part-{number}.jsonl")
    (folder / "notes.txt").write_text("no pairs")
    assert [text for text, *_ in sides(read(folder, "."))] == ["0", "1"]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "a", "chosen": "none.jpg", "rejected": "red.jpg"}, "pairs.jsonl:2: image none.jpg: no such file"),
        ({"prompt": "a", "chosen": "torn.jpg", "rejected": "red.jpg"}, "pairs.jsonl:2: image torn.jpg: not a readable"),
        ({"prompt": "a", "chosen": "pipe.jpg", "rejected": "red.jpg"}, "image is not a plain file"),
        ({"prompt": "a", "chosen": "../secret.jpg", "rejected": "red.jpg"}, "leaves the folder of images"),
        ({"prompt": "a", "chosen": "/etc/hostname", "rejected": "red.jpg"}, "leaves the folder of images"),
        ({"prompt": "a", "chosen": 3, "rejected": "red.jpg"}, "expected the name of a file or encoded bytes"),
        ({"prompt": " ", "chosen": "blue.jpg", "rejected": "red.jpg"}, '"prompt" is empty'),
        ({"prompt": "a", "image": "x.jpg"}, "the row has the keys image, prompt; expected prompt, chosen and rejected"),
        ({"prompt": "a", "image_0": "red.jpg", "image_1": "red.jpg", "winner": 2}, 'expected 0, 1 or "tie"'),
        ({"prompt": "a", "image_path": ["red.jpg"], "rank": [1]}, "a list of at least two images"),
        ({"prompt": "a", "image_path": ["red.jpg", "blue.jpg"], "rank": [1]}, "expected 2 numbers"),
        ({"prompt": "a", "image_path": ["red.jpg", "blue.jpg"], "rank": [1, "2"]}, "is no number"),
        ({"prompt": "a", "image_path": ["red.jpg", "blue.jpg"], "raw_annotations": []}, "at least one annotator"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(folder, row, told):
    (folder / "secret.jpg").write_bytes(encoded("red"))
    (folder / "images/torn.jpg").write_bytes(encoded("red", "JPEG")[:-200])
    os.mkfifo(folder / "images/pipe.jpg")
    write(folder, {"prompt": "good", "chosen": "red.jpg", "rejected": "blue.jpg"}, row)
    with pytest.raises(ValueError, match="1 of 2 rows of preference.pairs cannot be used") as refused:
        read(folder)
    assert told in str(refused.value)
    allowed = read(folder, bad=0.5)
    assert (len(allowed.pairs) == 1 and told.partition(": ")[2] in (folder / "quarantine.jsonl").read_text()) or told


def test_files_without_pairs_are_refused(folder):
    images = {"image_0": "red.jpg", "image_1": "blue.jpg"}
    write(folder, {"prompt": "a", **images, "winner": "tie"})
    with pytest.raises(ValueError, match="no pair in 1 rows; left out: {'tie': 1}"):
        read(folder)
    with pytest.raises(ValueError, match="no such file or folder"):
        read(folder, "none.jsonl")
    with pytest.raises(ValueError, match="expected a file of kind .csv"):
        read(folder, "images/red.jpg")
    with pytest.raises(ValueError, match="no files of pairs in this folder"):
        read(folder, "images")


@pytest.mark.parametrize(
    "key", ["pairs/given/../x", "pairs/other/x", "images/x", "pairs/kept//etc/passwd", "pairs/kept/"]
)
def test_keys_stay_in_their_folders(tmp_path, key):
    with pytest.raises(ValueError, match="image"):
        PairImages(tmp_path, tmp_path).load(key, 8)


@given(strategies.sets(strategies.text(min_size=1), min_size=1), strategies.floats(0, 0.99))
def test_held_out_prompts_leave_some_to_train_on(texts, fraction):
    pairs = [OwnPair(text, Prompt(text, text), "a", "b", "") for text in texts]
    held_out = held_out_prompts(pairs, fraction)
    assert len(held_out) < len(texts) and held_out <= texts
    assert bool(held_out) == (fraction > 0 and len(texts) > 1)


@given(strategies.lists(strategies.integers(1, 4), min_size=2, max_size=6))
def test_every_comparison_of_a_ranking_is_counted_once(ranks):
    row = {"prompt": "a", "image_path": [str(i) for i in range(len(ranks))], "rank": ranks}
    found = judged(row).comparisons
    assert len(found) == len(ranks) * (len(ranks) - 1) // 2
    outcomes = Counter(comparison.winner for comparison in found)
    assert outcomes[None] == sum(ranks[i] == ranks[j] for i in range(len(ranks)) for j in range(i))
    for (i, j), winner, _ in found:
        assert winner is None or ranks[(i, j)[winner]] < ranks[(i, j)[1 - winner]]


def test_pairs_alone_are_a_source(folder):
    write(folder, *({"prompt": str(i), "chosen": "red.jpg", "rejected": "blue.jpg"} for i in range(10)))
    found = read(folder, held_out=0.3)
    source = PairsSource(found, PairImages(folder / "images", folder / "run"))
    train, held_out = source.prompts("train", 99, 0), source.prompts("held_out", 99, 0)
    assert (len(train), len(held_out)) == (7, 3) and not {p.id for p in train} & {p.id for p in held_out}
    records = source.records(20, 0)
    assert len(records) == 20 and {record.prompt.id for record in records} == {p.id for p in train}
    assert source.load(records[0].image, 8).size == (8, 8) and source.winner_key(held_out[0]) == records[0].image
    with pytest.raises(ValueError, match="no prompt is held out"):
        PairsSource(read(folder, held_out=0.0), PairImages(folder, folder))


def test_pairs_beside_shapes_leave_them_as_they_are(folder):
    shapes = ShapesSource(ShapesConfig())
    both = SourceWithPairs(shapes, 5, PairImages(folder / "images", folder / "run"))
    prompt = both.prompts("held_out", 1, 0)[0]
    assert prompt == shapes.prompts("held_out", 1, 0)[0] and both.lines == 5
    assert both.load(both.winner_key(prompt), 16).size == both.load("pairs/given/red.jpg", 16).size
    assert both.questions(2, 0, "train") and both.edits(2, 0) and both.image_check() and both.edit_check()
