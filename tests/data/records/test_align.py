"""Prompts, winners by id and held-out records that the iterations take from training records."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.helpers.streams import COUNT, encoded_image, feed_of, native, write_sources
from vargpt_rl.data.quarantine import Quarantine
from vargpt_rl.data.records.align import RecordsSource, held_out_of
from vargpt_rl.data.records.images import InArchive, OnDisk
from vargpt_rl.data.records.sources import RecordSource
from vargpt_rl.data.samples import Prompt
from vargpt_rl.data.sources import is_held_out
from vargpt_rl.model.prompt import REPLY

FRACTION = 0.4


@pytest.fixture
def sources(tmp_path):
    return write_sources(tmp_path / "data")


def test_held_out_records_are_prompts_with_their_own_images(sources, tmp_path):
    feed = feed_of(tmp_path, sources, held_out_fraction=FRACTION)
    found = held_out_of(feed, 1000, tmp_path / "held_out")
    expected = {f"line-{n}" for n in range(COUNT) if n % 6} | {f"tar-{n}" for n in range(COUNT)}
    assert {prompt.id for prompt, _ in found} == {one for one in expected if is_held_out(one, FRACTION)}
    for prompt, image in found:
        kind, _, number = prompt.id.partition("-")
        if kind == "line":
            assert prompt == Prompt(prompt.id, f"Draw number {number}.", REPLY) and isinstance(image, OnDisk)
            assert image.open().read() == encoded_image(int(number))
        else:
            assert prompt == Prompt(prompt.id, f"Draw {number}, please.", "") and isinstance(image, InArchive)
            assert image.open().read() == encoded_image(100 + int(number))
    some = held_out_of(feed, 4, tmp_path / "held_out")
    assert [prompt.id.partition("-")[0] for prompt, _ in some] == ["line", "tar"] * 2, "sources in turn"
    with pytest.raises(ValueError, match="no record of data.sources is held out .* is 0.0"):
        held_out_of(replace(feed, held_out_fraction=0.0), 4, tmp_path)


def test_images_that_came_in_records_are_written_down_and_broken_ones_left_out(tmp_path):
    rows = [
        native(f"r{n}", "generation", ["draw", "<image_gen>"], [{"bytes": encoded_image(n), "path": ""}])
        for n in (1, 2)
    ]
    rows.append(native("r3", "generation", ["draw", "<image_gen>"], [{"bytes": b"none", "path": ""}]))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "all.parquet")
    held = RecordSource([str(tmp_path / "all.parquet")], "parquet")
    feed = feed_of(tmp_path, {"lines": held}, held_out_fraction=0.999999, max_bad_fraction=0.5)
    feed = replace(feed, tasks={"lines": "generation"})
    found = held_out_of(feed, 10, tmp_path / "held_out")
    assert [prompt.id for prompt, _ in found] == ["r1", "r2"]
    assert all(image.root == tmp_path / "held_out" for _, image in found)
    assert [image.open().read() for _, image in found] == [encoded_image(1), encoded_image(2)]


def held_out(folder: Path) -> list:
    (folder / "own.png").write_bytes(encoded_image(5))
    return [(Prompt(f"h{n}", f"held {n}", REPLY), OnDisk(folder, "own.png")) for n in range(2)]


def test_winners_are_named_after_the_ids_of_prompts(tmp_path):
    quarantine, winners = Quarantine(tmp_path / "quarantine.jsonl"), tmp_path / "winners"
    (winners / "deep").mkdir(parents=True)
    Image.new("RGB", (80, 40), "red").save(winners / "a.png")
    Image.new("RGB", (40, 80), "blue").save(winners / "deep" / "b.jpeg")
    Image.new("RGB", (40, 40), "green").save(winners / "h1.webp", lossless=True)
    Image.new("RGB", (40, 40), "white").save(tmp_path / "up.png")
    texts = {"a": "one", "deep/b": "two", "../up": "three", "c": "four"}
    prompts = [Prompt(identity, text, REPLY) for identity, text in texts.items()]
    source = RecordsSource(prompts, winners, held_out(tmp_path), quarantine)
    keys = {prompt.id: source.winner_key(prompt) for prompt in prompts}
    assert keys == {"a": "winners/a.png", "deep/b": "winners/deep/b.jpeg", "../up": None, "c": None}
    assert quarantine.counts == {"prompt without a winner": 2} and quarantine.lost == 0
    assert source.load(keys["a"], 32).getpixel((0, 0)) == (255, 0, 0)
    assert source.load(keys["a"], 32).size == (32, 32)
    own, other = (source.winner_key(prompt) for prompt in sorted(source.prompts("held_out", 9, 0), key=lambda p: p.id))
    assert (own, other) == ("held_out/h0", "winners/h1.webp")
    assert source.load(own, 32).size == (32, 32)
    for key in ("winners/", "held_out/nobody", "a.png"):
        with pytest.raises(ValueError, match="expected 'winners/<file>' or 'held_out/<prompt id>'"):
            source.load(key, 32)


def test_winners_may_be_spelt_a_little_otherwise_and_several_are_said(tmp_path):
    winners = tmp_path / "winners"
    winners.mkdir()
    for name in ("A.PNG", "b.v1.tif", "cafe\u0301.png", "d.png", "d.jpg"):
        Image.new("RGB", (8, 8)).save(winners / name)
    prompts = [Prompt(identity, identity, REPLY) for identity in ("a", "b.v1", "caf\u00e9", "d")]
    quarantine = Quarantine(tmp_path / "q.jsonl")
    source = RecordsSource(prompts, winners, [], quarantine)
    keys = [source.winner_key(prompt) for prompt in prompts]
    assert keys == ["winners/A.PNG", "winners/b.v1.tif", "winners/cafe\u0301.png", "winners/d.jpg"]
    assert quarantine.counts == {"several winners, of which the first is taken": 1} and quarantine.lost == 0
    assert json.loads((tmp_path / "q.jsonl").read_text())["record"] == "d.jpg, d.png"


def test_what_is_measured_on_is_never_trained_on(tmp_path):
    winners = tmp_path / "winners"
    winners.mkdir()
    Image.new("RGB", (40, 40)).save(winners / "a.png")
    given = [("h0", "same id"), ("other", "held 1"), ("a", "new")]
    source = RecordsSource(
        [Prompt(*one, REPLY) for one in given], winners, held_out(tmp_path), Quarantine(tmp_path / "q")
    )
    assert [prompt.id for prompt in source.prompts("train", 10, 0)] == ["a"]
    assert len(source.prompts("held_out", 1, 0)) == 1
    with pytest.raises(ValueError, match="unknown split 'test'"):
        source.prompts("test", 1, 0)


def test_missing_winners_are_named(tmp_path):
    prompts, quarantine = [Prompt("a", "one", REPLY)], Quarantine(tmp_path / "q.jsonl")
    with pytest.raises(ValueError, match="preference.winners=.*nowhere: no such folder"):
        RecordsSource(prompts, tmp_path / "nowhere", [], quarantine)
    (tmp_path / "winners").mkdir()
    with pytest.raises(ValueError, match="no winner of 1 prompts, expected names such as a.png"):
        RecordsSource(prompts, tmp_path / "winners", [], quarantine)
    assert json.loads((tmp_path / "q.jsonl").read_text())["lost"] is False
    assert RecordsSource([], None, [], quarantine).prompts("train", 3, 0) == []
