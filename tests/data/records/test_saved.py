"""Folders that `datasets` saved."""

import json
import os

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

from tests.helpers.records import png, rows


def test_saved_data_sets(tmp_path):
    items = [{"id": number, "images": [{"bytes": png(number), "path": None}]} for number in range(150)]
    Dataset.from_list(items).select(range(0, 150, 2)).save_to_disk(str(tmp_path / "saved"))
    assert [row for _, row in rows("saved", tmp_path / "saved")] == items[::2]
    assert [number for number, _ in rows("saved", tmp_path / "saved", 3, 30)] == [3, 33, 63]
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-500])
    ((number, reason),) = rows("saved", tmp_path / "saved")
    assert number == 0 and reason.startswith("data set is lost: ") and "breaks off" in reason


def names(*files: object) -> bytes:
    return json.dumps({"_data_files": list(files)}).encode()


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"3", b"[" * 100_000])
def test_a_saved_data_set_with_a_damaged_description_is_lost(tmp_path, name, text):
    Dataset.from_list([{"id": 1}]).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / name).write_bytes(text)
    found = rows("saved", tmp_path / "saved")
    assert found == [(0, {"id": 1})] or (len(found) == 1 and found[0][1].startswith("data set is lost: "))


@pytest.mark.parametrize(
    "state",
    [b"{}", names(), names("x"), names({}), names({"filename": 1}), names({"filename": "gone.arrow"}),
     names({"filename": "../other/data-00000-of-00001.arrow"}), names({"filename": "."}), names({"filename": ""}),
     names({"filename": "pipe.arrow"}), names({"filename": "state.json"})],
)  # fmt: skip
def test_a_saved_data_set_reads_plain_files_of_its_own_alone(tmp_path, state):
    for name in ("saved", "other"):
        Dataset.from_list([{"id": 1}]).save_to_disk(str(tmp_path / name))
    folder = tmp_path / "saved"
    os.mkfifo(folder / "pipe.arrow")
    (folder / "state.json").write_bytes(state)
    ((number, reason),) = rows("saved", folder)
    assert number == 0 and reason.startswith("data set is lost: ")
    absolute = names({"filename": str(tmp_path / "other" / "data-00000-of-00001.arrow")})
    (folder / "state.json").write_bytes(absolute)
    assert "is no plain file in its folder" in rows("saved", folder)[0][1]
    (folder / "link.arrow").symlink_to(tmp_path / "other" / "data-00000-of-00001.arrow")
    (folder / "state.json").write_bytes(
        (tmp_path / "other/state.json").read_bytes().replace(b"data-00000-of-00001", b"link")
    )
    assert rows("saved", folder) == [(0, {"id": 1})]


@pytest.mark.parametrize("compression", ["zstd", "lz4", None])
@pytest.mark.parametrize("text", ["plain", "in a dictionary"])
def test_a_saved_data_set_that_is_compressed_inside_is_lost(tmp_path, compression, text):
    folder = tmp_path / "saved"
    Dataset.from_list([{"text": "a" * 10_000}]).save_to_disk(str(folder))
    (file,) = folder.glob("*.arrow")
    values = pa.array(["a" * 10_000])
    table = pa.table({"text": values if text == "plain" else values.dictionary_encode()})
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    if compression:
        assert rows("saved", folder)[0][1].endswith("is compressed inside, expected as save_to_disk writes it")
    elif text == "plain":
        assert rows("saved", folder) == [(0, {"text": "a" * 10_000})]


def test_splits_have_to_be_named(tmp_path):
    DatasetDict({"train": Dataset.from_list([{"id": 1}])}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="saved: holds several splits"):
        rows("saved", tmp_path / "saved")
    assert rows("saved", tmp_path / "saved" / "train") == [(0, {"id": 1})]
