"""Files of exported models."""

from configs.load import load_config
from vargpt_rl.driver.exported import generation_files
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
        "turns": 1,
        "edits": False,
    }
    assert content["eos_token_id"] == 2


def test_a_run_with_edits_says_so():
    config = load_config(["stages=[pretrain,understanding,align,edit]"])
    assert generation_files(config, str(EMBEDDED), 128)[FILE][KEY]["edits"] is True
