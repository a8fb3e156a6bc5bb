"""The program with templates: inputs of all kinds, rejects, resuming, settings."""

import fcntl
import json
from pathlib import Path

import pandas as pd
import pytest

from vargpt_rl.data.instruct.__main__ import main

ROWS = [
    {"id": "a", "caption": "a red bicycle at a wall", "file": "a.png"},
    {"id": "b", "caption": "A dog runs on the beach.", "file": "sub/b.png"},
    {"id": "c", "caption": "é ü\u2028 ß 猫", "file": "c.png"},
]


def write_lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(captions: Path, out: Path, *more: str) -> int:
    return main([f"captions={captions}", f"out={out}", "method=template", *more])


def test_records_have_the_layout(tmp_path, capsys):
    out = tmp_path / "new" / "out.jsonl"
    assert run(write_lines(tmp_path / "captions.jsonl", ROWS), out) == 0
    first, *_ = written = read(out)
    assert [record["id"] for record in written] == ["a", "b", "c"]
    assert first.keys() == {"id", "messages", "images", "task", "method", "template"}
    user, assistant = first["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    assert "a red bicycle at a wall" in user["content"] and "<image_gen>" not in user["content"]
    assert "a red bicycle at a wall" in assistant["content"] and assistant["content"].endswith(" <image_gen>")
    assert (first["images"], first["task"], first["method"]) == (["a.png"], "generation", "template")
    assert first["template"].keys() == {"prompt", "answer", "medium"}
    assert "3  written" in capsys.readouterr().out


def test_all_kinds_of_files_say_the_same(tmp_path):
    results = []
    frame = pd.DataFrame(ROWS)
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_parquet(tmp_path / "t.parquet")
    write_lines(tmp_path / "t.jsonl", ROWS)
    for kind in ("csv", "parquet", "jsonl"):
        assert run(tmp_path / f"t.{kind}", tmp_path / f"{kind}.out") == 0
        results.append((tmp_path / f"{kind}.out").read_bytes())
    assert results[0] == results[1] == results[2]


def test_columns_can_be_named_and_the_file_left_out(tmp_path):
    pd.DataFrame({"key": [1, 2], "text": ["a fox", None]}).to_parquet(tmp_path / "t.parquet")
    assert run(tmp_path / "t.parquet", tmp_path / "out", "id_field=key", "caption_field=text") == 0
    (record,) = read(tmp_path / "out")
    assert record["id"] == "1" and record["images"] == []


def test_records_depend_neither_on_order_nor_on_each_other(tmp_path):
    rows = [{"id": str(number), "caption": f"{number} foxes"} for number in range(50)]
    run(write_lines(tmp_path / "t.jsonl", rows), tmp_path / "all")
    run(write_lines(tmp_path / "r.jsonl", rows[::-2]), tmp_path / "some")
    run(tmp_path / "t.jsonl", tmp_path / "other", "seed=1")
    every = {record["id"]: record for record in read(tmp_path / "all")}
    assert all(every[record["id"]] == record for record in read(tmp_path / "some"))
    assert sum(every[record["id"]] == record for record in read(tmp_path / "other")) < 5


def test_rejects_have_reasons_and_are_counted(tmp_path, capsys):
    bad = [
        "no json",
        "[1]",
        '{"id": "m"}',
        '{"id": "n", "caption": 5.5}',
        '{"id": "o", "caption": "\\ud800"}',
        '{"id": "p", "caption": "!?"}',
        '{"id": "q", "caption": "a fox <image_gen>"}',
        '{"id": "r", "caption": "a fox", "file": ["x"]}',
        '{"caption": "a fox"}',
        '{"id": "a", "caption": "another"}',
    ]
    captions = write_lines(tmp_path / "t.jsonl", [*ROWS, *bad])
    captions.write_bytes(captions.read_bytes() + b'{"id": "s", "caption": "\xff"}')
    assert run(captions, tmp_path / "out") == 1
    rejects = read(tmp_path / "out.rejects.jsonl")
    assert [(reject["record"], reject["reason"]) for reject in rejects] == [
        ("no json", "not JSON: Expecting value"),
        ("[1]", "list where an object is expected"),
        ("m", "caption is missing"),
        ("n 5.5", "caption is not text"),
        (r"o '\ud800'", "caption has characters that are no text"),
        ("p !?", "caption without a word"),
        ("q a fox <image_gen>", "special token in the caption"),
        ("r ['x']", "file is not text"),
        ("", "id is missing"),
        ("a", "id of an earlier record"),
        (r'{"id": "s", "caption": "\xff"}', "not UTF-8"),
    ]
    assert rejects[0]["source"].endswith("t.jsonl:4")
    said = capsys.readouterr()
    assert "1  rejected: not JSON: Expecting value" in said.out and "11 of 14 records rejected" in said.out
    assert said.err == "error: more than max_bad_fraction=0.5 of the records rejected\n"
    assert run(captions, tmp_path / "out", "max_bad_fraction=0.8") == 0
    assert len(read(tmp_path / "out.rejects.jsonl")) == 11  # those of the last run, not of both
    assert run(captions, tmp_path / "first", "limit=3", "max_bad_fraction=0") == 0


def test_bytes_that_are_no_text_in_a_csv_file_are_rejected(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"id,caption\n1,a fox\n2,a f\xffx\n3\n")
    run(tmp_path / "t.csv", tmp_path / "out")
    reasons = [reject["reason"] for reject in read(tmp_path / "out.rejects.jsonl")]
    assert reasons == ["not UTF-8", "caption is missing"]


@pytest.mark.parametrize("cut", [1, 2, 60, -1, -5])
def test_a_torn_last_line_is_made_again(tmp_path, cut):
    """``cut`` bytes are missing from the last line, or all but ``-cut``."""
    captions, out = write_lines(tmp_path / "t.jsonl", ROWS), tmp_path / "out"
    run(captions, out)
    whole = out.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    out.write_bytes(whole[:-cut] if cut > 0 else whole[: last - cut])
    assert run(captions, out) == 0
    assert out.read_bytes() == whole


def test_what_is_there_is_kept(tmp_path, capsys):
    captions, out = write_lines(tmp_path / "t.jsonl", ROWS[:2]), tmp_path / "out"
    run(captions, out)
    before = out.read_bytes()
    assert run(write_lines(captions, ROWS[::-1]), out, "seed=5") == 0
    assert out.read_bytes().startswith(before) and [record["id"] for record in read(out)] == ["a", "b", "c"]
    assert "2  already there" in capsys.readouterr().out


@pytest.mark.parametrize(
    "foreign",
    ['{"id": "x", "caption": "mine"}', '{"id": "x", "caption": "mine"}\n', "id,caption\n1,mine", '{"other', "[]\n"],
)
def test_a_file_of_something_else_is_not_touched(tmp_path, capsys, foreign):
    (tmp_path / "mine").write_text(foreign)
    assert run(write_lines(tmp_path / "t.jsonl", ROWS), tmp_path / "mine") == 2
    assert "mine: line 1 is not a dialogue" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == foreign


def test_two_runs_do_not_share_a_file(tmp_path, capsys):
    captions, out = write_lines(tmp_path / "t.jsonl", ROWS), tmp_path / "out"
    with out.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run(captions, out) == 2
    assert "another run is writing it" in capsys.readouterr().err
    assert run(captions, out) == 0


LLM = ("method=llm", "endpoint=http://127.0.0.1:1/v1", "model=m")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["captions=none.jsonl", "method=template"], "captions=none.jsonl: no such file"),
        (
            ["captions=t.txt", "method=template"],
            "t.txt: expected a file that ends in .csv, .tsv, .json, .jsonl",
        ),
        (["captions=bad.parquet", "method=template"], "bad.parquet: not a Parquet file"),
        (["captions=t.csv", "method=template", "caption_field=text"], "caption_field=text: no such column in t.csv"),
        (["captions=t.csv", "method=template", "id_field=key"], "id_field=key: no such column in t.csv"),
        (["captions=t.csv"], "method is not given: expected method=..."),
        (["captions=t.csv", "method=magic"], "method=magic"),
        (["captions=t.csv", "method=template", "sed=1"], "sed=1"),
        (["captions=t.csv", "method=template", "seed=one"], "seed=one"),
        (["captions=t.csv", "method=template", "limit=0"], "limit=0"),
        (["captions=t.csv", "method=template", "max_bad_fraction=2"], "max_bad_fraction=2"),
        (["captions=out", "method=template"], "out=out: expected another file than captions"),
        (["captions=empty.csv", "method=template"], "captions=empty.csv: no record in it"),
        (["captions=t.csv", "method=llm", "model=m"], "endpoint=: expected http://"),
        (["captions=t.csv", "method=llm", "endpoint=host:1/v1", "model=m"], "endpoint=host:1/v1: expected http://"),
        (["captions=t.csv", *LLM[:2]], "model=: expected"),
        (["captions=t.csv", *LLM, "concurrency=0"], "concurrency=0"),
        (["captions=t.csv", *LLM, "retries=-1"], "retries=-1"),
        (["captions=t.csv", *LLM, "timeout_s=0"], "timeout_s=0"),
    ],
)
def test_bad_settings_are_one_line_that_names_the_key(tmp_path, monkeypatch, capsys, arguments, named):
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text("id,caption\n1,a fox\n")
    Path("t.txt").write_text("a fox\n")
    Path("empty.csv").write_text("id,caption\n")
    Path("bad.parquet").write_text("a fox\n")
    Path("out").write_text("")
    assert main([*arguments, "out=out"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and named in message and message.count("\n") == 1
    assert Path("out").read_text() == ""


def test_an_output_that_cannot_be_opened_is_named(tmp_path, capsys):
    captions = write_lines(tmp_path / "t.jsonl", ROWS)
    (tmp_path / "folder").mkdir()
    assert run(captions, tmp_path / "folder") == 2
    assert run(captions, captions / "out") == 2
    said = capsys.readouterr().err
    assert "folder: Is a directory" in said and "out: File exists" in said and said.count("\n") == 2
