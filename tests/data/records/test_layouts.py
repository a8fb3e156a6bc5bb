import json
import tarfile
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.records import add, png, write_tar
from vargpt_rl.data.records.formats import FORMATS
from vargpt_rl.data.records.layouts import (
    Import,
    class_names,
    editing,
    imagenet,
    journeydb,
    laion,
    llava,
    midjourney,
    native,
)
from vargpt_rl.data.records.reader import ReadOptions, Records, file_parts
from vargpt_rl.data.records.schema import Limit, RecordConversation, loaded
from vargpt_rl.data.sources import REPLY


def read(files: list[Path], kind: str, steps: list, quarantine: Path) -> tuple[list, list[tuple[str, str]]]:
    """Return the records read from the files, in order, and the place and reason of each bad one."""
    found = list(
        Records(file_parts(files, FORMATS[kind]), steps, quarantine, ReadOptions(seed=None, max_bad_fraction=1.0))
    )
    written = quarantine / "shard-0-of-1.jsonl"
    lines = [json.loads(line) for line in written.read_text().splitlines()] if written.exists() else []
    return found, [(Path(line["source"]).name, line["reason"]) for line in lines]


def said(record: RecordConversation) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in record.messages]


def write_image(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(seed))


def as_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[turn % 2], "value": value} for turn, value in enumerate(values)]


def test_llava_1_5(tmp_path):
    write_image(tmp_path / "images/coco/train2017/000000033471.jpg")
    rows = [
        {"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
         "conversations": turns("<image>\nWhat are the colors of the bus?", "White and red.", "Is it moving?", "No.")},
        {"id": "wgByO4Y_0", "model": "", "conversations": turns("Write a poem.", "Roses are red.")},
        {"id": 2346046, "image": "vg/VG_100K/2346046.jpg", "conversations": turns("Where?\n<image>", "Here.")},
        {"id": "starts-with-gpt", "conversations": turns("x", "y", "z")[1:]},
        {"id": "html", "conversations": turns("What does <image> do?", "It is no tag.")},
        {"id": "silent", "conversations": turns("Hello?", "")},
        {"id": "two", "image": ["a.jpg", 7], "conversations": turns("<image><image>", "y")},
        {"id": "stranger", "conversations": [{"from": "tool", "value": "x"}]},
        {"id": "typed", "conversations": "none"},
        {"id": "typed", "conversations": ["none"]},
        {"id": "typed", "conversations": [{"from": "human", "value": 7}]},
        {"id": "away", "image": "../../etc/passwd", "conversations": turns("<image>", "y")},
        {"id": "long", "conversations": turns("x" * 300, "y")},
        {"id": True, "conversations": turns("x", "y")},
        {"conversations": turns("x", "y")},
    ]  # fmt: skip
    file = tmp_path / "llava_v1_5_mix665k.json"
    file.write_text(json.dumps(rows))
    step = Import(llava, "llava-1.5", tmp_path / "images", Limit(200))
    found, bad = read([file], "json", [step], tmp_path / "bad")
    assert [record.id for record in found] == ["000000033471", "wgByO4Y_0", "2346046"]
    assert {(record.task, record.source) for record in found} == {("understanding", "llava-1.5")}
    assert said(found[0])[:2] == [("user", "<image>\nWhat are the colors of the bus?"), ("assistant", "White and red.")]
    assert [len(record.images) for record in found] == [1, 0, 1] and len(found[0].messages) == 4
    assert loaded(found[0])[1][0].size == (6, 4)
    assert bad == [
        ("llava_v1_5_mix665k.json:4", "first turn is not the user's"),
        ("llava_v1_5_mix665k.json:5", "number of placeholders is not the number of images"),
        ("llava_v1_5_mix665k.json:6", "empty answer"),
        ("llava_v1_5_mix665k.json:7", "image is of type int, expected str, bytes or dict"),
        ("llava_v1_5_mix665k.json:8", "turn of 'tool', expected human or gpt"),
        ("llava_v1_5_mix665k.json:9", '"conversations" is of type str, expected list'),
        ("llava_v1_5_mix665k.json:10", '"conversations" has other items than objects'),
        ("llava_v1_5_mix665k.json:11", '"value" is of type int, expected str'),
        ("llava_v1_5_mix665k.json:12", "image path leaves its folder"),
        ("llava_v1_5_mix665k.json:13", "longer than 200 characters"),
        ("llava_v1_5_mix665k.json:14", '"id" is of type bool, expected str'),
        ("llava_v1_5_mix665k.json:15", '"id" is missing'),
    ]


@pytest.mark.parametrize("form", ["list", "images", "bytes", "dicts", "one of many"])
def test_llava_records_name_their_images_in_many_ways(tmp_path, form):
    write_image(tmp_path / "a.png", 1)
    write_image(tmp_path / "b.png", 2)
    given = {
        "list": {"image": ["a.png", "b.png"]},
        "images": {"images": ["a.png", "b.png"]},
        "bytes": {"images": [png(1), png(2)]},
        "dicts": {"images": [{"bytes": png(1), "path": None}, {"bytes": None, "path": "b.png"}]},
        "one of many": {"images": ["a.png", "b.png"], "image": None},
    }[form]
    record = llava({"id": 7, **given, "conversations": turns("<image><image>\nWhich?", "Both.")}, tmp_path)
    assert record.id == "7" and [image.open().read() for image in record.images] == [png(1), png(2)]
    single = llava({"id": 7, "image": png(1), "conversations": turns("<image>", "A.")}, tmp_path)
    assert single.images[0].open().read() == png(1)
    for nothing in ({}, {"image": None}, {"image": ""}, {"image": []}, {"images": []}):
        assert llava({"id": 7, **nothing, "conversations": turns("Hello", "Hello.")}, tmp_path).images == ()


@pytest.mark.parametrize("layout", [llava, native])
@pytest.mark.parametrize("system", ["Be short.", " "])
def test_a_system_turn_comes_before_the_users_first_words(tmp_path, layout, system):
    said_by = [("system", system), ("user", "What?"), ("assistant", "This."), ("user", "And?"), ("assistant", "That.")]
    if layout is llava:
        row = {"id": "x", "conversations": [{"from": role, "value": text} for role, text in said_by]}
    else:
        messages = [{"role": role, "content": text} for role, text in said_by]
        row = {"id": "x", "task": "understanding", "messages": messages, "images": []}
    record = layout(row, tmp_path)
    first = "Be short.\n\nWhat?" if system.strip() else "What?"
    assert said(record) == [("user", first), *said_by[2:]]


def test_img2dataset_tars(tmp_path):
    file = tmp_path / "00000.tar"
    with tarfile.open(file, "w") as archive:
        for number in range(3):
            key = f"{number:09d}"
            told = {"caption": f"caption {number}", "key": key, "status": "success", "url": "http://x/y.jpg"}
            add(archive, f"{key}.jpg", png(number))
            add(archive, f"{key}.json", json.dumps(told if number else {"key": key}).encode())
            add(archive, f"{key}.txt", f"caption {number}\n".encode())
    found, bad = read([file], "webdataset", [Import(laion, "laion", tmp_path), loaded], tmp_path / "bad")
    assert not bad and [record.id for record, _ in found] == ["000000000", "000000001", "000000002"]
    assert [said(record)[0] for record, _ in found] == [("user", f"caption {number}") for number in range(3)]
    assert all(images[0].size == (6, 4) for _, images in found)


def test_text_and_images_of_tars_are_not_guessed(tmp_path):
    file = tmp_path / "00000.tar"
    texts = ["\ufeffa cat".encode(), "caf\xe9".encode("latin1"), "a cat".encode("utf-16"), b"new", b"two"]
    with tarfile.open(file, "w") as archive:
        for number, text in enumerate(texts):
            add(archive, f"{number:09d}.jpg", png(number))
            add(archive, f"{number:09d}.txt", b"old" if text == b"new" else text)
        add(archive, "000000003.txt", b"new")
        add(archive, "000000003.jpg", png(7))
        add(archive, "000000004.webp", png(8))
    found, bad = read([file], "webdataset", [Import(laion, "laion", tmp_path), loaded], tmp_path / "bad")
    assert [said(record)[0][1] for record, _ in found] == ["a cat", "new"]
    assert found[1][0].images[0].open().read() == png(7), "of two members of a name, the later one counts"
    assert sorted(reason for _, reason in bad) == [
        "archive member is not UTF-8",
        "archive member is not UTF-8",
        "row brings more than one image",
    ]


def test_what_a_tar_brings_beside_records_is_noted_and_not_lost(tmp_path):
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w") as archive:
        for number in range(3):
            add(archive, f"{number}.cls", b"3")
            add(archive, f"{number}.json", json.dumps({"conversations": turns("<image>", "A.")}).encode())
            add(archive, f"{number}.png", png(number))
    found, noted = read([file], "webdataset", [Import(llava, "l", tmp_path), loaded], tmp_path / "bad")
    assert [record.id for record, _ in found] == ["0", "1", "2"]
    assert noted == [("a.tar:1", "archive members of kind '.cls' are not read")]
    line = json.loads((tmp_path / "bad/shard-0-of-1.jsonl").read_text())
    assert line["lost"] is False and line["record"] == "0.cls"


def test_llava_onevision(tmp_path):
    def row(name: str, image: dict | None, *values: str) -> dict:
        return {"id": name, "image": image, "conversations": turns(*values), "data_source": "chart2text"}

    rows = [
        row("a.png", {"bytes": png(1), "path": "a.png"}, "<image>\nSummarize.", "A chart."),
        row("text only", None, "1 + 1?", "2"),
        row("no placeholder", {"bytes": png(1), "path": None}, "Summarize.", "A chart."),
        row("broken", {"bytes": b"\xff\xd8\xff", "path": "a.jpg"}, "<image>", "A chart."),
        row("elsewhere", {"bytes": None, "path": "b.png"}, "<image>", "A chart."),
        row("nowhere", {"bytes": None, "path": None}, "<image>", "A chart."),
    ]
    write_image(tmp_path / "images/b.png", 2)
    file = tmp_path / "train-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    steps = [Import(llava, "onevision", tmp_path / "images"), loaded]
    found, bad = read([file], "parquet", steps, tmp_path / "bad")
    assert [(record.id, len(images)) for record, images in found] == [
        ("a.png", 1),
        ("text only", 0),
        ("elsewhere", 1),
    ]
    assert [reason for _, reason in bad] == [
        "number of placeholders is not the number of images",
        "image of no known kind, expected one of AVIF, BMP, GIF, JPEG, JPEG2000, PNG, TIFF, WEBP",
        '"path" is of type NoneType, expected str',
    ]


def test_journeydb(tmp_path):
    questions = {"Content Relevant Questions and Answers": [{"Question": "Who?", "Options": {"A": "x"}, "Answer": "A"}]}
    rows = [
        {"img_path": "./000/0a1b.jpg", "prompt": "a fox --ar 16:9 --v 5", "Task1": {"Style": []},
         "Task2": {"Caption": "A red fox in snow."}, "Task3": questions},
        {"img_path": "./001/2c3d.jpg", "prompt": "red fox, snow --ar 16:9 --v 5"},
        {"img_path": "./001/2c3d.jpg", "prompt": "red fox, snow", "Task2": {}},
        {"img_path": "./001/2c3d.jpg", "prompt": "--v 5"},
        {"img_path": "/001/2c3d.jpg", "prompt": "fox"},
        {"img_path": "./001/2c3d.jpg", "prompt": "fox", "Task2": "none"},
        {"img_path": "./001/2c3d.jpg", "prompt": "fox", "Task2": {"Caption": ["none"]}},
        {"prompt": "fox"},
    ]  # fmt: skip
    write_image(tmp_path / "imgs/000/0a1b.jpg")
    file = as_jsonl(tmp_path / "train_anno.jsonl", rows)
    found, bad = read([file], "jsonl", [Import(journeydb, "journeydb", tmp_path / "imgs")], tmp_path / "bad")
    assert [(record.id, record.task) for record in found] == [("0a1b", "generation"), *[("2c3d", "generation")] * 2]
    assert [said(record)[0][1] for record in found] == ["A red fox in snow.", "red fox, snow", "red fox, snow"]
    assert said(found[0])[1] == ("assistant", f"{REPLY}<image_gen>")
    assert loaded(found[0])[1][0].size == (6, 4)
    assert [reason for _, reason in bad] == [
        "empty question",
        "image path leaves its folder",
        '"Task2" is of type str, expected dict',
        '"Caption" is of type list, expected str',
        '"img_path" is missing',
    ]


def test_laion_coco_aesthetic(tmp_path):
    def row(key: object, caption: str | None, status: str = "success") -> dict:
        url = "https://example.org/a.jpg"
        return {"key": key, "url": url, "caption": caption, "status": status, "width": 512, "pwatermark": 0.1}

    rows = [row("000120034", "A bowl of soup."), row("7", "A desk."), row("000000001", "x", "failed_to_download")]
    rows += [row("000000002", None), row("../../x", "x"), row("000000003", "A cat <image_gen>.")]
    write_image(tmp_path / "images/00012/000120034.jpg")
    file = tmp_path / "laion-coco.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    found, bad = read([file], "parquet", [Import(laion, "laion", tmp_path / "images")], tmp_path / "bad")
    assert [(record.id, record.images[0].name) for record in found] == [
        ("000120034", "00012/000120034.jpg"),
        ("000000007", "00000/000000007.jpg"),
    ]
    assert said(found[0]) == [("user", "A bowl of soup."), ("assistant", f"{REPLY}<image_gen>")]
    assert loaded(found[0])[1][0].size == (6, 4)
    assert [reason for _, reason in bad] == [
        "image was not fetched",
        '"caption" is of type NoneType, expected str',
        "image path leaves its folder",
        "number of placeholders is not the number of images",
    ]
    numbered = tmp_path / "numbered.parquet"
    pq.write_table(pa.table({"key": [120034], "caption": ["A bowl of soup."], "url": ["u"]}), numbered)
    (record,), _ = read([numbered], "parquet", [Import(laion, "laion", tmp_path / "images")], tmp_path / "bad")
    assert record.images == found[0].images


def test_midjourney_prompts(tmp_path):
    prompts = ["a fox, oil --ar 16:9 --v 5.1 --stylize 750", "a fox", "--v 5", None]
    file = tmp_path / "000000.zstd.parquet"
    pq.write_table(pa.table({"prompt": prompts, "version": ["5.1", "4.0", "5", "5"]}), file, compression="zstd")
    found, bad = read([file], "parquet", [midjourney], tmp_path / "bad")
    assert [(request.prompt.text, request.commands) for (request,) in found] == [
        ("a fox, oil", {"ar": "16:9", "v": "5.1", "stylize": "750"}),
        ("a fox", {}),
    ]
    assert found[0][0].prompt.reply == REPLY and len({request.prompt.id for (request,) in found}) == 2
    assert [reason for _, reason in bad] == [
        "prompt of nothing but commands",
        '"prompt" is of type NoneType, expected str',
    ]


def test_x2i_and_stylebooth(tmp_path):
    one, two = "<img><|image_1|></img>", "<img><|image_2|></img>"

    def row(instruction: str, inputs: object, output: object = "out.png", key: str = "output_image") -> dict:
        return {"task_type": "image_edit", "instruction": instruction, "input_images": inputs, key: output}

    style = "stylebooth/BatchA/AbstractExpressionism/100.png"
    rows = [
        row(f"{one} The umbrella should be red.", ["a.png"], style),
        row(f"{two} is worn by {one}.", ["a.png", "b.png"]),
        row("Let this image be in the style of Art Nouveau", ["a.png"], key="output_images"),
        row("A white cat.", []),
        row(f"{one} and nothing of the other", ["a.png", "b.png"]),
        row(f"{two}", ["a.png"]),
        row("red", ["a.png"], None),
        row("red", "a.png"),
        row("red", [7]),
        row("red", ["../a.png"]),
        row(" ", ["a.png"]),
    ]
    for seed, name in enumerate(("a.png", "b.png", style)):
        write_image(tmp_path / "x2i" / name, seed)
    file = as_jsonl(tmp_path / "stylebooth-1.jsonl", rows)
    found, bad = read([file], "jsonl", [Import(editing, "x2i", tmp_path / "x2i")], tmp_path / "bad")
    assert [(record.task, said(record)[0][1], [image.name for image in record.images]) for record in found] == [
        ("editing", "<image> The umbrella should be red.", ["a.png", style]),
        ("editing", "<image> is worn by <image>.", ["b.png", "a.png", "out.png"]),
        ("editing", "<image>Let this image be in the style of Art Nouveau", ["a.png", "out.png"]),
        ("generation", "A white cat.", ["out.png"]),
    ]
    assert said(found[0])[1] == ("assistant", f"{REPLY}<image_gen>") and len(loaded(found[0])[1]) == 2
    assert [reason for _, reason in bad] == [
        "images named in the instruction are not the input images",
        "images named in the instruction are not the input images",
        '"output_image" is of type NoneType, expected str',
        '"input_images" is of type str, expected list',
        '"input_images" has a int, expected str',
        "image path leaves its folder",
        '"instruction" is empty',
    ]


def test_imagenet(tmp_path):
    train = tmp_path / "ILSVRC/Data/CLS-LOC/train"
    for name in ("n01440764/n01440764_10026", "n01440764/n01440764_10027", "n01443537/n01443537_16", "n9/n9_1"):
        write_image(train / f"{name}.JPEG")
    mapping = tmp_path / "LOC_synset_mapping.txt"
    mapping.write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n")
    step = Import(partial(imagenet, names=class_names(mapping)), "imagenet", train)
    found, bad = read([train], "synsets", [step, loaded], tmp_path / "bad")
    record, images = found[0]
    assert record.id == "n01440764/n01440764_10026.JPEG" and images[0].size == (6, 4)
    assert said(record) == [
        ("user", "Please generate a picture about tench, Tinca tinca"),
        ("assistant", "The picture of the tench, Tinca tinca is as follows: <image_gen>"),
    ]
    assert [said(record)[0][1].rpartition(" ")[2] for record, _ in found] == ["tinca", "auratus", "tinca"]
    assert bad == [("train:3", "synset without a name")]
    mapping.write_text("n01440764\n")
    with pytest.raises(ValueError, match="LOC_synset_mapping.txt: no name for n01440764"):
        class_names(mapping)


def test_own_layout_in_tars(tmp_path):
    write_tar(tmp_path / "0.tar", range(3))
    with tarfile.open(tmp_path / "1.tar", "w") as archive:
        messages = [{"role": "user", "content": "draw"}, {"role": "assistant", "content": " "}]
        add(archive, "7.json", json.dumps({"task": "generation", "messages": messages}).encode())
        add(archive, "7.png", png())
        messages[1]["content"] = "Here: <image_gen>"
        add(archive, "8.json", json.dumps({"task": "generation", "messages": messages}).encode())
        add(archive, "8.png", png())
    steps = [Import(native, "own", tmp_path), loaded]
    found, bad = read([tmp_path / "0.tar", tmp_path / "1.tar"], "webdataset", steps, tmp_path / "bad")
    assert [record.id for record, _ in found] == ["r0", "r1", "r2", "8"]
    assert all(images[0].size == (6, 4) for _, images in found)
    assert bad == [("1.tar:1", "empty answer")]
