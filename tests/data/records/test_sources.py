"""Configured sources open as they say, and what is missing is named with its source."""

import json

import pytest
from PIL import Image

from vargpt_rl.common.settings import parse
from vargpt_rl.data.records.reader import ReadOptions
from vargpt_rl.data.records.sources import RecordSource, open_records


def write(folder, name: str, count: int) -> None:
    rows = []
    for index in range(count):
        Image.new("RGB", (4, 4)).save(folder / f"{name}-{index}.png")
        turns = [("user", "<image> what?"), ("assistant", "this")]
        messages = [{"role": role, "content": text} for role, text in turns]
        images = [f"{name}-{index}.png"]
        rows.append({"id": f"{name}{index}", "task": "understanding", "messages": messages, "images": images})
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_globs_are_read_in_order_and_passed_through_the_steps(tmp_path):
    write(tmp_path, "b", 2)
    write(tmp_path, "a", 1)
    source = RecordSource(files=[str(tmp_path / "*.jsonl")])
    records = open_records(
        "mine", source, ReadOptions(seed=None), tmp_path / "bad", (lambda one: (one.source, one.id),)
    )
    assert list(records) == [("mine", "a0"), ("mine", "b0"), ("mine", "b1")]


@pytest.mark.parametrize("name", ["a[1].jsonl", "a*.jsonl", "what?.jsonl", "[x]/a.jsonl"])
def test_a_path_that_exists_is_taken_as_written(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    (tmp_path / "a1.jsonl").touch()
    assert RecordSource([str(path)]).paths() == [path]


def test_class_folders_start_from_themselves(tmp_path):
    (tmp_path / "set" / "n01").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "set" / "n01" / "x.JPEG")
    (tmp_path / "names.txt").write_text("n01 tench\n")
    source = RecordSource([str(tmp_path / "set")], "synsets", "imagenet", names=str(tmp_path / "names.txt"))
    (record,) = open_records("classes", source, ReadOptions(), tmp_path / "bad")
    assert "tench" in record.messages[0].text and record.images[0].open().read()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"files": ["nothing/*.jsonl"]}, "source mine: files: nothing fits nothing/*.jsonl"),
        ({}, "source mine: files: none given"),
        ({"files": ["here.jsonl"], "images": "absent"}, "images=absent"),
        ({"format": "xml"}, "format=xml"),
        ({"layout": "coco"}, "layout=coco"),
        ({"layout": "imagenet"}, "needs names"),
        ({"weight": 0.0}, "weight=0.0"),
    ],
)
def test_faults_name_the_source_and_the_key(tmp_path, monkeypatch, settings, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.jsonl").write_text("")
    with pytest.raises(ValueError, match="^.*$") as error:
        open_records("mine", parse(RecordSource, settings, "data.sources.mine"), ReadOptions(), tmp_path / "bad")
    assert named in str(error.value)
