"""Encoding of a corpus: each image once; unreadable images are counted and left out."""

import pytest

from tests.helpers.driver import stage_context
from vargpt_rl.data.features import FeatureCache
from vargpt_rl.data.records.images import key_sha256
from vargpt_rl.data.samples import Prompt, Record
from vargpt_rl.driver.corpus import encode_corpus


@pytest.fixture
def context(tmp_path):
    return stage_context(tmp_path)


def test_unreadable_images_are_quarantined_and_encoded_ones_kept(context, tmp_path):
    keys = ["good", "bad", "fine", "good"]
    records = [Record(str(i), Prompt(str(i), "a circle"), key) for i, key in enumerate(keys)]
    for _ in range(2):  # the second time after an interruption
        readable = encode_corpus(context, records, tmp_path)
        assert [record.id for record in readable] == ["0", "2", "3"]
        assert context.inputs.quarantine.counts == {"broken": 1}
    cache = FeatureCache(tmp_path / str(context.resolution), "", context.resolution)
    assert len(cache) == 2 and (key_sha256("fine"), 0) in cache
    with pytest.raises(ValueError, match="none of 1 training images"):
        encode_corpus(context, records[1:2], tmp_path / "other")


def test_images_that_cannot_be_shown_are_quarantined(context, tmp_path):
    shown = ["bad", "good", None]
    records = [Record(str(i), Prompt(str(i), "turn it", "", key, 56), "target") for i, key in enumerate(shown)]
    assert encode_corpus(context, records, tmp_path) == records[1:]
    assert context.inputs.quarantine.counts == {"unreadable at 56": 1}
