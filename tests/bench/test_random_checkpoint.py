"""A checkpoint of random weights is a whole model, which a run accepts and images can be sampled from."""

import pytest
import torch

from vargpt_rl.bench.gpu import sized_config
from vargpt_rl.bench.random_checkpoint import main, write_checkpoint
from vargpt_rl.model.families import load_model, markup_for
from vargpt_rl.model.generate import SamplingConfig, generate_images
from vargpt_rl.model.hub import check_model
from vargpt_rl.model.whole import check_values


def test_images_are_sampled_from_random_weights(tmp_path):
    folder = tmp_path / "random"
    config = sized_config(True, 1.0)
    config.text_config.vocab_size = 1000  # more rows than the tokenizer has words, as at the release's size
    count = write_checkpoint(config, folder, torch.device("cpu"))
    assert check_model(str(folder)) == str(folder)
    check_values(folder)
    model = load_model(folder, torch.float32).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    chat = markup_for(str(folder), model.config)
    ids_BT = chat.pad([chat.drawing_prompt("a circle", "")], "left")
    drawn = generate_images(model, ids_BT, torch.ones_like(ids_BT), [0], (64, 64), SamplingConfig())
    assert 0.2 < drawn.labels_BLs.float().mean() < 0.8


@pytest.mark.parametrize("arguments", [["--fraction", "0"], ["--fraction", "1.5"], []])
def test_bad_arguments_are_refused(tmp_path, arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main([str(tmp_path), *arguments])
    assert error.value.code == 2 and "expected" in capsys.readouterr().err
