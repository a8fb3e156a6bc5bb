"""Sampling defaults that travel with a checkpoint."""

import json

import pytest
from transformers import GenerationConfig

from vargpt_rl.model.drawing_defaults import FILE, KEY, DrawingDefaults, read_defaults, with_defaults
from vargpt_rl.model.hub import EMBEDDED


def test_a_checkpoint_without_defaults_says_nothing(tmp_path):
    assert read_defaults(tmp_path) == DrawingDefaults()


def test_defaults_are_written_beside_the_other_settings(tmp_path):
    (tmp_path / FILE).write_text(json.dumps({"eos_token_id": 2, KEY: {"cfg": 9.0}}))
    content = with_defaults(tmp_path, DrawingDefaults(resolution=128, edits=False))
    assert content == {"eos_token_id": 2, KEY: {"resolution": 128, "edits": False}}
    (tmp_path / FILE).write_text(json.dumps(content))
    assert read_defaults(tmp_path) == DrawingDefaults(resolution=128, edits=False)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 2, "transformers reads the file too"


@pytest.mark.parametrize("content", ["[]", "{", '{"image_generation": 1}', '{"image_generation": {"cgf": 1}}'])
def test_a_bad_file_is_named(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        read_defaults(tmp_path)


def test_the_embedded_model_draws_as_it_was_measured():
    known = read_defaults(EMBEDDED)
    assert known.resolution == 128 and known.cfg == 1.0
    assert known.turns == 4 and known.edits is True
