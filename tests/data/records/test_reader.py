import json
import os
import shutil
import subprocess
import sys
import tarfile
from itertools import islice
from pathlib import Path

import pytest
import torch

from tests.helpers import records as world
from vargpt_rl.data.quarantine import BadRecord
from vargpt_rl.data.records.formats import FORMATS
from vargpt_rl.data.records.layouts import Import, native
from vargpt_rl.data.records.reader import ReadOptions, Records, file_parts
from vargpt_rl.data.records.schema import loaded

ALL = {f"r{number}" for number in range(world.COUNT)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records") / "data"
    world.write(folder)
    return folder


def read(folder, kind, **reading) -> list[str]:
    return [record.id for record in world.records(folder, kind, ReadOptions(**reading))]


def test_resumed_elsewhere_every_stream_gives_exactly_the_rest(folder):
    states, whole, at = [], [], []
    for number, setup in enumerate(world.SETUPS):
        stream, taken = world.loader(folder, *setup), 11 + number % 7  # beyond the first block
        items, found = iter(stream), []
        found += [world.names(item) for item in islice(items, taken)]
        states.append(stream.state_dict())
        found += [world.names(item) for item in islice(items, world.COUNT)]
        whole.append(found)
        at.append(taken)
    torch.save(states, folder / "states.pt")
    here = {"PYTHONPATH": str(Path(__file__).parents[3]), "PYTHONWARNINGS": "ignore"}
    script = [sys.executable, str(Path(world.__file__)), str(folder)]
    subprocess.run(script, check=True, env=os.environ | here)
    rest = json.loads((folder / "rest.json").read_text())
    for setup, found, taken, left in zip(world.SETUPS, whole, at, rest, strict=True):
        assert left == found[taken:], setup
        assert len(left) >= 7, setup


@pytest.mark.parametrize("kind", world.KINDS)
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_disjoint_and_complete(folder, kind, workers):
    found = [
        [name for item in world.loader(folder, kind, rank, workers) for name in world.names(item)] for rank in (0, 1)
    ]
    assert len(found[0] + found[1]) == world.COUNT
    assert {name.removeprefix(f"{kind}/") for name in found[0] + found[1]} == ALL
    assert min(map(len, found)) >= world.COUNT // 3


@pytest.mark.parametrize("kind", world.KINDS)
def test_a_state_at_any_place_is_exact(folder, kind):
    """Also between blocks, at the end of an epoch, and after the last record."""
    reading = ReadOptions(block=7, epochs=2)
    whole = read(folder, kind, block=7, epochs=2)
    assert len(whole) == 2 * world.COUNT
    for place in (0, 1, 6, 7, 8, 42, 59, 60, 61, 63, 119, 120):
        items = iter(world.records(folder, kind, reading))
        assert [record.id for record in islice(items, place)] == whole[:place]
        resumed = iter(world.records(folder, kind, reading))
        resumed.load_state_dict(items.state_dict())
        assert [record.id for record in resumed] == whole[place:]


def test_members_of_other_kinds_do_not_move_a_resumed_stream(folder, tmp_path):
    for path in folder.glob("*.tar"):
        shutil.copy(path, tmp_path)
        with tarfile.open(tmp_path / path.name, "a") as archive:
            for stem in sorted({name.partition(".")[0] for name in archive.getnames()}):
                world.add(archive, f"{stem}.npy", b"other")
    reading = ReadOptions(block=5)
    whole = [record.id for record in world.records(tmp_path, "webdataset", reading)]
    assert sorted(whole) == sorted(ALL)
    for place in (1, 5, 7, 13):
        items = iter(world.records(tmp_path, "webdataset", reading))
        assert [record.id for record in islice(items, place)] == whole[:place]
        resumed = iter(world.records(tmp_path, "webdataset", reading))
        resumed.load_state_dict(items.state_dict())
        assert [record.id for record in resumed] == whole[place:]


def test_the_seed_shuffles_within_blocks_and_epochs_differ(folder):
    in_order = read(folder, "json", seed=None)
    assert in_order == [f"r{number}" for number in range(world.COUNT)]
    shuffled = read(folder, "json", seed=3, block=20)
    assert shuffled == read(folder, "json", seed=3, block=20) != read(folder, "json", seed=4, block=20)
    for begin in (0, 20, 40):
        assert shuffled[begin : begin + 20] != in_order[begin : begin + 20]
        assert set(shuffled[begin : begin + 20]) == set(in_order[begin : begin + 20])
    twice = read(folder, "webdataset", seed=3, epochs=2)
    assert (
        set(twice[: world.COUNT]) == set(twice[world.COUNT :]) == ALL and twice[: world.COUNT] != twice[world.COUNT :]
    )
    endless = islice(world.records(folder, "jsonl", ReadOptions(epochs=None)), 3 * world.COUNT)
    assert len({record.id for record in endless}) == world.COUNT


def test_a_state_of_another_setup_is_refused(folder):
    state = iter(world.records(folder, "json", ReadOptions())).state_dict()
    for other in (ReadOptions(seed=1), ReadOptions(block=9), ReadOptions(world=2), ReadOptions(rank=1, world=2)):
        with pytest.raises(ValueError, match="saved as .* resumed as"):
            iter(world.records(folder, "json", other)).load_state_dict(state)


def test_only_a_block_is_held(folder, monkeypatch):
    taken = []
    form = FORMATS["jsonl"]
    counted = type(form)(form.parts, lambda *where: (taken.append(found) or found for found in form.rows(*where)))
    stream = Records(file_parts([folder / "0.jsonl"], counted), [], folder / "quarantine/held", ReadOptions(block=5))
    next(iter(stream))
    assert len(taken) == 5


# Bad rows


def bad(number: int):
    """A step that finds every fifth row bad."""

    def step(record):
        if int(record.id[1:]) % number == 0:
            raise BadRecord("divisible")
        return record

    return step


def stream_of(folder, tmp_path, steps, **reading) -> Records:
    steps = [Import(native, "bad", folder / "images"), *steps]
    return Records(file_parts([folder / "all.json"], FORMATS["json"]), steps, tmp_path, ReadOptions(**reading))


def written(folder: Path) -> list[dict]:
    files = sorted(folder.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_bad_rows_are_quarantined_with_file_record_and_reason(folder, tmp_path):
    found = [record.id for record in stream_of(folder, tmp_path, [bad(20)])]
    assert set(found) == ALL - {"r0", "r20", "r40"} and len(found) == world.COUNT - 3
    assert sorted((Path(line["source"]).name, line["reason"], line["lost"]) for line in written(tmp_path)) == [
        ("all.json:1", "divisible", True),
        ("all.json:21", "divisible", True),
        ("all.json:41", "divisible", True),
    ]
    assert all("'id': 'r" in line["record"] for line in written(tmp_path))


def test_rows_that_are_not_meant_for_a_reading_are_neither_given_nor_bad(folder, tmp_path):
    def others(record):
        return record if int(record.id[1:]) % 2 else None

    steps = [bad(3), others, lambda record: record.id]
    items = iter(stream_of(folder, tmp_path, steps, max_bad_fraction=0.4))
    found = list(items)
    assert set(found) == {f"r{n}" for n in range(world.COUNT) if n % 2 and n % 3} and len(found) == 20
    assert items.state_dict()["lost"] == len(written(tmp_path)) == 20
    endless = iter(stream_of(folder, tmp_path, [lambda record: None], epochs=None))
    with pytest.raises(ValueError, match="no usable record in shard 0 of 1"):
        next(endless)


def test_too_many_bad_rows_end_the_reading_with_a_table(folder, tmp_path):
    items = iter(stream_of(folder, tmp_path, [bad(5)], block=20, max_bad_fraction=0.1, seed=None))
    with pytest.raises(ValueError, match=r"4 of 20 records are bad, more than .* 0.1 (.|\n)*4  divisible"):
        for number, record in enumerate(items):
            assert number < 16, record  # the first block is read to its end
    list(stream_of(folder, tmp_path, [bad(5)], block=20, max_bad_fraction=0.2))
    with pytest.raises(ValueError, match="12 of 60"):  # also where the file is shorter than a block
        list(stream_of(folder, tmp_path / "whole", [bad(5)], max_bad_fraction=0.19))


def test_a_resumed_stream_counts_as_if_it_had_never_stopped(folder, tmp_path):
    """Those it had written down before it went back are neither written nor counted twice."""
    reading = dict(block=10, max_bad_fraction=0.2, epochs=2)
    items = iter(stream_of(folder, tmp_path, [bad(5)], **reading))
    for _ in range(20):
        next(items)
    state = items.state_dict()
    assert len(list(items)) == 96 - 20
    resumed = iter(stream_of(folder, tmp_path, [bad(5)], **reading))
    resumed.load_state_dict(state)
    assert len(list(resumed)) == 96 - 20
    assert resumed.state_dict()["seen"] == 120 and resumed.state_dict()["lost"] == 24
    assert len(written(tmp_path)) == 12


def test_unreadable_images_are_found_when_they_are_decoded(folder, tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(world.COUNT):
        (tmp_path / "images" / f"{number}.png").write_bytes(world.png(number))
    (tmp_path / "images" / "3.png").write_bytes(world.png()[:-40])
    (tmp_path / "images" / "4.png").unlink()
    steps = [Import(native, "bad", tmp_path / "images"), loaded]
    reading = ReadOptions(max_bad_fraction=0.1)
    found = list(Records(file_parts([folder / "all.json"], FORMATS["json"]), steps, tmp_path / "bad", reading))
    assert len(found) == 58 and all(images[0].size == (6, 4) for _, images in found)
    assert {line["reason"] for line in written(tmp_path / "bad")} == {
        "image is missing",
        "image is unreadable (OSError)",
    }


def test_a_lost_file_is_reported_once_and_the_others_are_read(folder, tmp_path):
    whole = (folder / "0.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    files = [tmp_path / "cut.tar", folder / "1.tar"]
    steps = [Import(native, "bad", tmp_path)]
    found = []
    for rank in range(3):  # more shards than files: each reads every third row of both
        reading = ReadOptions(rank=rank, world=3, max_bad_fraction=0.5)
        found += list(Records(file_parts(files, FORMATS["webdataset"]), steps, tmp_path / "bad", reading))
    ids = [record.id for record in found]
    assert len(ids) == len(set(ids)) and {f"r{number}" for number in range(12, 24)} < set(ids) < ALL
    assert [line["reason"] for line in written(tmp_path / "bad")] == [
        "rest of the archive is lost: it is damaged or breaks off"
    ]


def test_wrong_use_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="no such file: .*nowhere.json"):
        Records(file_parts([tmp_path / "nowhere.json"], FORMATS["json"]), [], tmp_path, ReadOptions())
    with pytest.raises(ValueError, match="no files"):
        Records(file_parts([], FORMATS["json"]), [], tmp_path, ReadOptions())
    with pytest.raises(ValueError, match="rank=2: expected 0 or more and less than world=2"):
        ReadOptions(rank=2, world=2)
    with pytest.raises(ValueError, match="block=0: expected 1 or more"):
        ReadOptions(block=0)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no usable record in shard 0 of 1"):
        next(
            iter(
                Records(
                    file_parts([tmp_path / "empty.jsonl"], FORMATS["jsonl"]), [], tmp_path, ReadOptions(epochs=None)
                )
            )
        )
