"""A corpus is encoded once; unreadable images are counted and left out."""

import json

import pytest

from tests.helpers.driver import stage_context
from vargpt_rl.data.samples import Prompt, Record
from vargpt_rl.driver.corpus import encode_corpus


@pytest.fixture
def it(tmp_path):
    return stage_context(tmp_path)


def test_unreadable_images_are_quarantined_and_a_finished_corpus_is_kept(it, tmp_path):
    records = [Record(str(i), Prompt(str(i), "a circle"), key) for i, key in enumerate(["good", "bad", "fine"])]
    counts = encode_corpus(it, records, tmp_path / "corpus")
    assert counts == {"images": 2, "failed": 1} and it.inputs.quarantine.counts == {"broken": 1}
    assert len((tmp_path / "corpus/prompts.jsonl").read_text().splitlines()) == 2
    encoded = len(it.pool.calls)
    assert encode_corpus(it, records, tmp_path / "corpus") == counts and len(it.pool.calls) == encoded
    with pytest.raises(ValueError, match="none of 1 training images"):
        encode_corpus(it, records[1:2], tmp_path / "other")


def test_images_that_cannot_be_shown_are_quarantined(it, tmp_path):
    shown = ["bad", "good", None]
    records = [Record(str(i), Prompt(str(i), "turn it", "", key, 56), "target") for i, key in enumerate(shown)]
    assert encode_corpus(it, records, tmp_path / "corpus") == {"images": 2, "failed": 1}
    assert it.inputs.quarantine.counts == {"unreadable at 56": 1}
    prompts = [json.loads(line) for line in (tmp_path / "corpus/prompts.jsonl").read_text().splitlines()]
    assert [prompt["shown"] for prompt in prompts] == ["good", None]
