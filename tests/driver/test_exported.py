"""Files of exported models."""

import json

import pytest
from huggingface_hub import ModelCard

from configs.load import load_config
from vargpt_rl.driver.exported import generation_files, write_card
from vargpt_rl.model.drawing_defaults import FILE, KEY
from vargpt_rl.model.hub import EMBEDDED


def test_a_model_draws_as_its_run_did():
    settings = ["sampling.cfg=2", "at.256.sampling.tau=0.8"]
    content = generation_files(load_config(settings), str(EMBEDDED), 256)[FILE]
    assert content[KEY] == {
        "resolution": 256,
        "cfg": 2.0,
        "tau": 0.8,
        "top_k": 900,
        "top_p": 0.97,
        "turns": 4,
        "edits": True,
    }
    assert content["eos_token_id"] == 2


@pytest.mark.parametrize(("stages", "edits"), [("[align]", False), ("[align,edit]", True)])
def test_a_run_with_edits_says_so(tmp_path, stages, edits):
    (tmp_path / FILE).write_text(json.dumps({KEY: {"edits": False}}))
    config = load_config([f"stages={stages}"])
    assert generation_files(config, str(tmp_path), 128)[FILE][KEY]["edits"] is edits


def test_the_card_of_a_model_has_base_recipe_and_scores(tmp_path):
    config = load_config(["iterations=1", "resolutions=[128]"])
    (tmp_path / "model").mkdir()
    (tmp_path / "samples").mkdir()
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    for name in ("iter-00.png",):
        (tmp_path / "samples" / name).write_bytes(name.encode())
    after = {"overall": 0.75, "overall_low": 0.67, "overall_high": 0.82, "n": 120}
    summary = {"stages": {}, "iterations": [{"resolution": 128, "sft": {}, "eval": {"after_sft": after}}]}
    write_card(tmp_path / "model", tmp_path, config, summary)
    card = ModelCard.load(tmp_path / "model/README.md")
    assert card.data.library_name == "vargpt_rl" and "grpo" in card.data.tags
    assert "from `tiny`" in card.text and "rewards.shapes:shapes_reward" in card.text
    assert "| 0 | 128 | after SFT | 120 | 0.750 (0.67 to 0.82) |" in card.text
    assert "## Held-out images\n" in card.text and "margin" not in card.text and "1 iteration at" in card.text
    assert (tmp_path / "model/samples.png").read_bytes() == b"iter-00.png"


def test_a_card_without_scores_or_grid_is_written(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    write_card(tmp_path / "model", tmp_path, load_config(["checkpoint=org/name"]), {"stages": {}, "iterations": []})
    card = ModelCard.load(tmp_path / "model/README.md")
    assert card.data.base_model == "org/name" and "samples.png" not in card.text
