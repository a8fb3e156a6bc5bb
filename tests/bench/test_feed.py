"""The benchmark streams the same records in every format, and trains on them."""

import pytest

from vargpt_rl.bench import feed
from vargpt_rl.data.records.reader import ReadOptions
from vargpt_rl.data.records.sources import open_records


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    return folder, feed.write_sources(folder, count=16, side=64)


def test_every_format_has_the_same_records(sources):
    folder, found = sources
    messages = {}
    for kind, source in found.items():
        records = open_records(kind, source, ReadOptions(seed=None, block=4), folder / "bad")
        messages[kind] = {record.id: record.messages for record in records}
    assert len(messages["jsonl"]) == 16
    assert messages["parquet"] == messages["jsonl"] == messages["webdataset"]


def test_measures_rate_and_waiting(sources):
    folder, found = sources
    measured = feed.measure(found["webdataset"], folder / "run", resolution=32, micro_batch=2, batches=2, steps=2)
    assert measured.samples_a_second > 0 and measured.step_seconds > 0 and 0 <= measured.wait < 1
