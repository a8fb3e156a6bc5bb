"""CLIP score and HPSv2 are 100 x the rewards of the same names."""

import numpy as np
import pytest
import torch
from PIL import Image

from rewards.clip import ClipScore
from rewards.hps import HPSv2
from tests.helpers.tiny_reward_models import clip_model, clip_settings, open_clip_state
from vargpt_rl.common.averages import interval
from vargpt_rl.evaluate import scorers

PROMPTS = ("a red circle", "two blue squares", "a star at night")


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return f"prompts={file}"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A CLIP model, a checkpoint in HPSv2's published format, and its base model."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("clip", "base"):
        (folder / name).mkdir()
    clip_model(folder / "clip")
    clip_settings(folder / "base")
    torch.save({"state_dict": open_clip_state()}, folder / "hps.pt")
    return folder


@pytest.mark.parametrize("benchmark", ["clip", "hps"])
def test_score_is_100_times_the_mean_reward(command, prompts, painted, folder, result, models, monkeypatch, benchmark):
    monkeypatch.setattr(scorers, "BATCH", 2)
    if benchmark == "clip":
        options, reward = [f"weights={models / 'clip'}"], ClipScore(str(models / "clip"))
    else:
        options = [f"weights={models / 'hps.pt'}", f"base={models / 'base'}"]
        reward = HPSv2(str(models / "hps.pt"), str(models / "base"))
    assert command(f"benchmark={benchmark}", prompts, *options) == 0
    images = [Image.open(path) for path in sorted((folder(benchmark) / "images").iterdir())]
    values = 100 * np.array(reward(images, list(PROMPTS)))
    metric = {"clip": "clip_score", "hps": "hps"}[benchmark]
    row = result(benchmark)
    assert row["metrics"] == {metric: pytest.approx(values.mean())}
    assert row["intervals"] == {metric: pytest.approx(interval(values.tolist()), rel=1e-4)}
    assert row["counts"] == {"images": 3, "unscored": 0, "bad_prompts": 0}


def test_unscored_images_do_not_count_as_zero(command, prompts, painted, result, monkeypatch, models, capsys):
    def some(self, images, prompts):
        return [None if "star" in prompt else 0.5 for prompt in prompts]

    monkeypatch.setattr(ClipScore, "__call__", some)
    arguments = ["benchmark=clip", prompts, f"weights={models / 'clip'}"]
    assert command(*arguments) == 2
    assert "only 2 of 3 images have a clip_score" in capsys.readouterr().err
    assert command(*arguments, "max_bad_fraction=0.5") == 0
    assert result("clip")["metrics"] == {"clip_score": 50.0}
    assert result("clip")["counts"]["unscored"] == 1


def test_bad_weights_fail_before_generating(command, prompts, painted, tmp_path, capsys):
    assert command("benchmark=hps", prompts, f"weights={tmp_path / 'none.pt'}") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: rewards.hps:HPSv2 does not work with weights={tmp_path / 'none.pt'}: ")
    (tmp_path / "empty").mkdir()
    assert command("benchmark=clip", prompts, f"weights={tmp_path / 'empty'}") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: rewards.clip:ClipScore does not work with model={tmp_path / 'empty'}: ")
    assert said.count("\n") == 1 and not painted


def test_counts_bad_prompts_on_every_run(command, painted, tmp_path, result, models, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a star"}\nnot JSON\n{"prompt": "a star"}\n{"prompt": "a circle"}\n')
    arguments = ["benchmark=clip", f"prompts={file}", f"weights={models / 'clip'}"]
    for _ in range(2):
        assert command(*arguments, "max_bad_fraction=0.4") == 0
        assert result("clip")["counts"] == {"images": 2, "unscored": 0, "bad_prompts": 1}
        assert command(*arguments) == 2
        assert "1 of 3 records are bad" in capsys.readouterr().err
