import bz2
import gzip
import json
import lzma
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.records import add, png, rows, write_tar
from vargpt_rl.data.records import formats
from vargpt_rl.data.records.formats import FORMATS, Fault
from vargpt_rl.data.records.images import InArchive
from vargpt_rl.data.records.reader import file_parts

# JSON


@pytest.fixture
def array(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "a.json"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def test_json_arrays(array):
    items = [{"id": number, "text": '[{,}] \\ " \u00e9' * number} for number in range(30)]
    for text in (json.dumps(items), json.dumps(items, indent=2), "\ufeff \n" + json.dumps(items, ensure_ascii=False)):
        assert rows("json", array(text)) == list(enumerate(items))
    assert rows("json", array(json.dumps(items)), 4, 7) == [(number, items[number]) for number in (4, 11, 18, 25)]
    assert rows("json", array(" [ ] ")) == []


@pytest.mark.parametrize(
    ("text", "whole", "said"),
    [
        ("", 0, "breaks off"),
        ("id: 1", 0, "not a JSON array"),
        ('[{"id": 1}, {"id": 2}', 1, "breaks off"),
        ('[{"id": 1}, {"id"', 1, "breaks off"),
        ('[{"id": 1},]', 1, "breaks off"),
        ('[{"id": 1} {"id": 2}]', 1, "breaks off"),
        ('[{"id": 1}] [', 1, "breaks off"),
        (b'[{"id": "\xff"}]', 0, "not UTF-8"),
        ('[{"id": 1}, ' + "[" * 100_000, 1, "too deeply nested"),
        ('[{"id": 1}, ' + "9" * 5000 + ", 1]", 1, "digits"),
    ],
)
def test_damaged_json_arrays_give_what_comes_before(array, text, whole, said):
    found = rows("json", array(text))
    assert found[:-1] == [(0, {"id": 1})] * whole
    number, reason = found[-1]
    assert number == whole and reason.startswith("rest of the file is lost: ") and said in reason


def test_a_row_that_is_no_object_costs_only_itself(array):
    found = rows("json", array('[1, {"id": 1}, "a", null, [2]]'))
    assert [row for _, row in found] == [
        "int where an object is expected",
        {"id": 1},
        "str where an object is expected",
        "NoneType where an object is expected",
        "list where an object is expected",
    ]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@given(st.lists(json_values, max_size=6), st.sampled_from([None, 1]), st.integers(1, 9))
def test_arrays_are_cut_right_wherever_a_chunk_ends(tmp_path_factory, items, indent, chunk):
    path = tmp_path_factory.getbasetemp() / "chunks.json"
    path.write_text(json.dumps(items, indent=indent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "_CHUNK", chunk)
        with path.open(encoding="utf-8") as file:
            assert list(formats._items(file)) == items


def test_no_row_of_json_may_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST", 100)
    monkeypatch.setattr(formats, "_CHUNK", 10)
    path = tmp_path / "a.json"
    path.write_text('[{"id": 1}, "' + "x" * 1000)
    assert rows("json", path)[-1] == (1, "rest of the file is lost: not a JSON array, or a row that is too long")
    path.write_text("x" * 150 + '\n{"id": 1}\n')
    assert rows("jsonl", path) == [(0, "row of more than 100 bytes"), (1, {"id": 1})]
    assert rows("jsonl", path, 1, 1) == [(1, {"id": 1})]
    for length in (98, 99, 100, 101, 199, 200, 201, 1000):  # every way in which a chunk may end in the line
        path.write_text('"' + "x" * (length - 2) + '"\n{"id": 1}')
        assert [number for number, _ in rows("jsonl", path)] == [0, 1] and rows("jsonl", path)[1] == (1, {"id": 1})


def test_arrays_and_lines_are_told_apart_whatever_the_ending(tmp_path):
    path = tmp_path / "a"
    items = [{"id": number} for number in range(5)]
    for text in (json.dumps(items), "\ufeff \n" + json.dumps(items, indent=1), "\n".join(map(json.dumps, items))):
        path.write_text(text)
        for kind in ("json", "jsonl"):
            assert [row for _, row in rows(kind, path)] == items
            assert [row for _, row in rows(kind, path, 1, 2)] == items[1::2]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (gzip.compress(b'{"id": 1}', mtime=0), "compressed with gzip"),
        (bz2.compress(b'{"id": 1}'), "compressed with bzip2"),
        (lzma.compress(b'{"id": 1}'), "compressed with xz"),
        (b"\x28\xb5\x2f\xfd\0\0", "compressed with zstd"),
        (b"PK\x03\x04\x14\0", "a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer"),
        ('{"id": 1}'.encode("utf-32"), "encoded as UTF-32"),
        ('{"id": 1}'.encode("utf-32-be"), "encoded as UTF-32"),
        ('{"id": 1}'.encode("utf-16"), "encoded as UTF-16"),
        ('{"id": 1}'.encode("utf-16-le"), "encoded as UTF-16"),
        ('{"id": 1}'.encode("utf-16-be"), "encoded as UTF-16"),
        (b"PAR1\x15\x04", "a Parquet file"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, data, said):
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    for kind in ("json", "jsonl", "csv"):
        with pytest.raises(ValueError, match=f"a.jsonl: {said}, expected"):
            file_parts([path], FORMATS[kind])
    if "UTF-" not in said and "Parquet" not in said:
        with pytest.raises(ValueError, match=f"a.jsonl: {said}, expected"):
            file_parts([path], FORMATS["webdataset"])


# JSON lines


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = ['\ufeff{"id": 0}', "", '{"id": 2}\r', "[1]", '{"id": ', "[" * 100_000, '{"id": "\u00e9"}']
    path.write_bytes("\n".join(lines).encode() + b"\n\xff\n")
    assert rows("jsonl", path) == [
        (0, {"id": 0}),
        (2, {"id": 2}),
        (3, "list where an object is expected"),
        (4, "not JSON: Expecting value"),
        (5, "not JSON: too deeply nested"),
        (6, {"id": "\u00e9"}),
        (7, "not UTF-8"),
    ]
    assert [number for number, _ in rows("jsonl", path, 2, 2)] == [2, 4, 6]


# Parquet


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    items = [
        {"id": number, "image": {"bytes": png(number), "path": None}, "turns": [{"a": "b"}]} for number in range(200)
    ]
    pq.write_table(pa.Table.from_pylist(items), path, row_group_size=150)
    assert FORMATS["parquet"].parts(path) == 2
    assert [row for _, row in rows("parquet", path)] == items
    taken = [number for number in range(200) if number % 150 >= 7 and (number % 150 - 7) % 70 == 0]
    assert [row["id"] for _, row in rows("parquet", path, 7, 70)] == taken == [7, 77, 147, 157]


def test_damaged_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"id": list(range(100)), "text": [f"{number}" * 50 for number in range(100)]})
    pq.write_table(table, path, row_group_size=50, compression="none", use_dictionary=False)
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"not Parquet at all"):
        path.write_bytes(data)
        assert FORMATS["parquet"].parts(path) == 1
        ((number, reason),) = rows("parquet", path)
        assert number == 0 and reason == "rest of the row group is lost: Parquet cannot be read (ArrowInvalid)"
    path.write_bytes(whole[:8] + bytes(1000) + whole[1008:])  # the first row group
    found = rows("parquet", path)
    assert found[0][1].startswith("rest of the row group is lost") and [row["id"] for _, row in found[1:]] == list(
        range(50, 100)
    )


LARGE = 8 * 2**20


@pytest.mark.parametrize("nested", [False, True])
def test_a_repeated_value_is_not_held_once_for_each_row(tmp_path, nested):
    path = tmp_path / "bomb.parquet"
    value = bytes(LARGE)
    items = [{"id": number, "image": {"bytes": value} if nested else value} for number in range(64)]
    pq.write_table(pa.Table.from_pylist(items), path, compression="zstd")
    assert path.stat().st_size < 10_000
    del items
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    count = 0
    for _, row in FORMATS["parquet"].read(path, 0, 0, 1):
        assert not isinstance(row, Fault) and pool.bytes_allocated() - before < 6 * LARGE
        count += 1
    assert count == 64


def test_rows_and_row_groups_of_parquet_are_bounded(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    rows_of = [{"text": "x" * 50}, {"text": "x" * 2000}, {"text": "y"}]
    pq.write_table(pa.Table.from_pylist(rows_of), path)
    monkeypatch.setattr(formats, "LONGEST", 1000)
    assert [row for _, row in rows("parquet", path)] == [rows_of[0], "row of more than 1000 bytes", rows_of[2]]
    values = [[["x" * 90] * 20], [["x" * 9] * 5]]  # a list of lists
    pq.write_table(pa.table({"lists": values, "none": [None, None], "numbers": [[1.0] * 9] * 2}), path)
    assert rows("parquet", path) == [
        (0, "row of more than 1000 bytes"),
        (1, {"lists": values[1], "none": None, "numbers": [1.0] * 9}),
    ]
    monkeypatch.setattr(formats, "LARGEST_GROUP", 100)
    ((number, reason),) = rows("parquet", path)
    assert number == 0 and reason.startswith("row group is lost: of ") and reason.endswith("expected at most 100")


ENCODINGS = ["PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_every_encoding_of_texts_is_read(tmp_path, encoding, version):
    path = tmp_path / "a.parquet"
    items = [{"text": text} for text in ("abc", "abd", None, "abe")]
    how = {"use_dictionary": False, "column_encoding": encoding, "data_page_version": version}
    pq.write_table(pa.Table.from_pylist(items), path, **how)
    assert [row for _, row in rows("parquet", path)] == items


def of(kind: pa.DataType, *values: object) -> pa.Array:
    return pa.array(values, kind)


ODD_VALUES = {
    "time beyond the calendar": of(pa.timestamp("us"), 2**62, 0),
    "date beyond the calendar": of(pa.int32(), 2**31 - 1, 0).cast(pa.date32()),
    "duration beyond the clock": of(pa.duration("s"), 2**62, 0),
    "unknown time zone": of(pa.timestamp("us", tz="No/Where"), 0, None),
    "no UTF-8": pa.StringArray.from_buffers(
        2, pa.py_buffer(np.array([0, 2, 4], np.int32)), pa.py_buffer(b"\xff\xfeok")
    ),
    "fields of the same name": pa.StructArray.from_arrays(
        [of(pa.int32(), 1, 2), of(pa.int32(), 1, 2)], names=["a", "a"], mask=pa.array([False, True])
    ),
}


@pytest.mark.parametrize("name", ODD_VALUES)
def test_a_value_that_python_cannot_hold_costs_its_row(tmp_path, name):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1, 2], "odd": ODD_VALUES[name]}), path)
    (_, first), (_, second) = rows("parquet", path)
    assert first.startswith("row has a value that cannot be read") and second["id"] == 2


@pytest.mark.parametrize(
    "values",
    [
        of(pa.map_(pa.string(), pa.int32()), [("a", 1)]),
        of(pa.list_view(pa.string()), ["a"]),
        of(pa.string_view(), "a"),
        of(pa.large_binary(), b"a"),
        of(pa.list_(pa.float32(), 2), [1.0, 2.0]),
        of(pa.string(), "a").dictionary_encode(),
        pa.ExtensionArray.from_storage(pa.json_(), of(pa.string(), "{}")),
    ],
    ids=lambda values: str(values.type),
)
def test_other_kinds_of_values_are_read(tmp_path, values):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": values}), path)
    assert rows("parquet", path) == [(0, {"a": values[0].as_py()})]


def test_columns_of_the_same_or_no_name_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([of(pa.int32(), 1), of(pa.int32(), 2)], names=["a", "a"]), path)
    assert rows("parquet", path) == [(0, "file is lost: it has column 'a' more than once")]
    pq.write_table(
        pa.table(
            {"abc": [1]},
        ),
        path,
        store_schema=False,
    )
    path.write_bytes(path.read_bytes().replace(b"abc", b"\xff\xfe\xfd"))
    ((_, reason),) = rows("parquet", path)
    assert reason == "rest of the row group is lost: Parquet cannot be read (UnicodeDecodeError)"
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), path)
    assert rows("parquet", path) == []


SMALL = 2**20
BOMBS = {
    "page": (of(pa.large_binary(), bytes(64 * SMALL)), "PLAIN"),
    "pages": (of(pa.binary(), *([bytes(SMALL)] * 64)), "PLAIN"),
    "fixed length": (of(pa.binary(SMALL), *([bytes(SMALL)] * 64)), None),
    "shared prefixes": (of(pa.binary(), *([bytes(SMALL)] * 64)), "DELTA_BYTE_ARRAY"),
    "shared prefixes in a list": (of(pa.list_(pa.binary()), [bytes(SMALL)] * 64), "DELTA_BYTE_ARRAY"),
    "numbers": (of(pa.list_(pa.int8()), bytes(8 * SMALL)), None),
    "absent values": (of(pa.list_(pa.int8()), [None] * (8 * SMALL)), None),
}


@pytest.mark.parametrize("honest", [True, False])
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_by_its_pages(tmp_path, monkeypatch, name, honest):
    """64 MiB in a few kB are refused above 32 MiB, whatever the footer says of sizes."""
    path = tmp_path / "a.parquet"
    values, encoding = BOMBS[name]
    how = {"use_dictionary": False, "column_encoding": encoding} if encoding else {}
    table = pa.table({"a": values})
    pq.write_table(table, path, compression="zstd", write_statistics=False, write_batch_size=1, **how)
    if not honest:
        understate(path)
    del table
    monkeypatch.setattr(formats, "LARGEST_GROUP", 32 * SMALL)
    before = pa.total_allocated_bytes()
    ((_, reason),) = rows("parquet", path)
    assert reason.startswith("row group is lost: of ") and pa.total_allocated_bytes() - before < SMALL


def understate(path: Path) -> None:
    """Write into the footer that the values of the first column take 50 bytes."""
    size = pq.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size
    length = max(1, -(-(2 * size).bit_length() // 7))
    coded = [bytes((2 * number >> 7 * at & 127) | (128 if at < length - 1 else 0) for at in range(length))
             for number in (size, 50)]  # fmt: skip
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    path.write_bytes(data[:footer] + data[footer:].replace(*coded))
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size == 50


def test_a_row_of_many_small_values_is_refused_in_no_time(tmp_path):
    path = tmp_path / "a.parquet"
    repeated = pa.DictionaryArray.from_arrays(np.zeros(10**6, np.int32), ["x"]).cast(pa.string())
    pq.write_table(pa.table({"a": pa.ListArray.from_arrays(pa.array([0, 10**6], pa.int32()), repeated)}), path)
    began = time.monotonic()
    assert rows("parquet", path) == [(0, f"row of more than {formats.LONGEST} bytes")]
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("cut", [1, 5, 50, 500])
def test_pages_that_cannot_be_found_are_a_fault(tmp_path, cut):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": [f"{number}" for number in range(1000)]}), path, use_dictionary=False)
    data = path.read_bytes()
    for damage in (b"\xff" * cut, bytes(cut), data[cut : 2 * cut]):
        path.write_bytes(data[:4] + damage + data[4 + len(damage) :])
        found = rows("parquet", path)
        assert all(isinstance(row, dict) for _, row in found) or "lost: " in found[-1][1]


# WebDataset


def test_tars(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        folder = tarfile.TarInfo("./shard")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        add(archive, "./shard/0001.1.PNG", png(1))
        add(archive, "./shard/0001.0.jpg", b"first")
        add(archive, "./shard/0001.json", b'{"id": "one", "images": "none"}')
        add(archive, "./shard/0002.txt", "a caf\u00e9".encode())
        add(archive, "./other.d/0002.txt", b"another")
    (_, one), (_, two), (_, three) = rows("webdataset", path)
    assert (one["id"], one["__key__"], len(one["images"])) == ("one", "shard/0001", 2)
    assert [image.open().read() for image in one["images"]] == [b"first", png(1)]
    assert all(isinstance(image, InArchive) for image in one["images"])
    assert two == {"__key__": "shard/0002", "images": [], "txt": "a caf\u00e9"}
    assert three["__key__"] == "other.d/0002"
    assert rows("webdataset", path, 1, 2) == [(1, two)]


def test_members_that_are_no_part_of_a_record(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    monkeypatch.setattr(formats, "LONGEST", 1000)
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        add(archive, "1.npy", b"array")
        add(archive, "2.json", b"[1]")
        add(archive, "3.txt", bytes(1001))
        add(archive, "4.txt", b"good")
    assert [row for _, row in rows("webdataset", path)] == [
        "archive member is not a plain file",
        "archive members of kind '.npy' are not read",
        {"__key__": "1", "images": []},
        "list where an object is expected",
        "archive member is too long",
        {"__key__": "4", "images": [], "txt": "good"},
    ]


def test_members_that_systems_add_are_skipped_and_others_noted_once(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(3):
            add(archive, f"./{number}.cls", b"3")
            add(archive, f"./._{number}.json", b"\0\5\26\7")
            add(archive, f"./{number}.json", b'{"id": "%d"}' % number)
            add(archive, f"./__MACOSX/{number}.json", b"[]")
        add(archive, ".DS_Store", b"Bud1")
    found = rows("webdataset", path)
    assert [row["id"] for _, row in found if isinstance(row, dict)] == ["0", "1", "2"]
    assert [row for _, row in found if isinstance(row, str)] == ["archive members of kind '.cls' are not read"]
    assert [number for number, _ in found] == [0, 0, 1, 2]


@pytest.mark.parametrize("order", [sorted, lambda names: sorted(names, key=lambda name: name[::-1]), reversed])
def test_members_of_a_row_need_not_lie_together(tmp_path, order):
    path = tmp_path / "a.tar"
    names = [f"{number}.{kind}" for number in range(20) for kind in ("json", "png", "txt")]
    with tarfile.open(path, "w") as archive:
        for name in order(names):
            add(archive, name, {"json": b'{"id": "x"}', "png": png(), "txt": b"words"}[name.partition(".")[2]])
    found = [row for _, row in rows("webdataset", path)]
    assert len(found) == 20 and {row["__key__"] for row in found} == {str(number) for number in range(20)}
    assert all(row["id"] == "x" and row["txt"] == "words" and len(row["images"]) == 1 for row in found)


def test_names_with_dots_are_told_to_be_one_row(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(4):
            add(archive, f"v1.{number:06d}.json", b"{}")
            add(archive, f"v1.{number:06d}.png", png())
    assert rows("webdataset", path) == [(0, "4 .json members have the name before the first dot in common")]


def test_damaged_tars_give_what_comes_before(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, range(4))  # two members of 1 kB a row, two blocks of zeros and more at the end
    whole = path.read_bytes()
    lost = "rest of the archive is lost: it is damaged or breaks off"
    for end, count in (
        (0, 0),
        (100, 0),
        (1000, 0),
        (2048, 0),
        (2100, 0),
        (2600, 1),
        (3072, 1),
        (4 * 2048 - 200, 3),
        (4 * 2048, 3),
    ):
        path.write_bytes(whole[:end])
        found = rows("webdataset", path)
        assert [number for number, _ in found] == list(range(count + 1)) and found[-1][1] == lost, end
        assert all("id" in row for _, row in found[:-1])
    path.write_bytes(whole[:4096] + b"x" * 512 + whole[4608:])  # a header
    assert [number for number, _ in rows("webdataset", path)] == [0, 1] and rows("webdataset", path)[1][1] == lost
    path.write_bytes(b"not a tar" * 1000)
    assert rows("webdataset", path) == [(0, lost)]


# Folders of images by class


def test_synsets_take_turns(tmp_path):
    for synset, count in (("n01", 3), ("n02", 1), ("n03", 2)):
        (tmp_path / synset).mkdir()
        for number in range(count):
            (tmp_path / synset / f"{synset}_{number}.JPEG").write_bytes(b"")
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01 a fish\n")
    for name in (".DS_Store", "n01/.DS_Store", "n01/._n01_0.JPEG", "__MACOSX/n01.JPEG", ".cache/a.JPEG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = rows("synsets", tmp_path)
    assert [row["file"] for _, row in found] == [
        "n01/n01_0.JPEG", "n02/n02_0.JPEG", "n03/n03_0.JPEG", "n01/n01_1.JPEG", "n03/n03_1.JPEG", "n01/n01_2.JPEG"
    ]  # fmt: skip
    assert [row["synset"] for _, row in found[:3]] == ["n01", "n02", "n03"]
    assert rows("synsets", tmp_path, 4, 1) == found[4:]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("found", ["pipe", "device", "folder", "file"])
def test_what_is_no_file_of_the_format_is_refused_unread(tmp_path, kind, found):
    path = tmp_path / "odd"
    make = {
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
        "file": path.touch,
    }
    make[found]()
    expected = "folder" if FORMATS[kind].folder else "file"
    if found == expected:
        file_parts([path], FORMATS[kind])
        return
    said = "not a plain file" if expected == "file" and found != "folder" else f"expected a {expected}"
    with pytest.raises(ValueError, match=f"{path}: {said}"):
        file_parts([path], FORMATS[kind])
