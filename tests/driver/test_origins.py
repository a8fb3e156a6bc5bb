"""A run notices that what it reads from elsewhere has changed since it was begun."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.load import load_config
from rewards.preferences import external_winner
from vargpt_rl.data.quarantine import Quarantine
from vargpt_rl.data.sources import ShapesConfig, ShapesSource
from vargpt_rl.driver.inputs import Inputs
from vargpt_rl.driver.origins import check_origins
from vargpt_rl.driver.run import Run
from vargpt_rl.driver.start import plain
from vargpt_rl.model.whole import WEIGHTS


@pytest.fixture
def begun(checkpoint, tmp_path):
    """Start a run in a folder with a model and prompts; called again, start it again. Return the run's events."""
    model, prompts = tmp_path / "model", tmp_path / "prompts.txt"
    shutil.copytree(checkpoint, model)
    prompts.write_text("a red circle\n")
    config = load_config([f"runs={tmp_path}", "name=run", f"checkpoint={model}", f"preference.prompts={prompts}"])
    inputs = Inputs(
        model=str(model),
        source=ShapesSource(ShapesConfig()),
        quarantine=Quarantine(tmp_path / "quarantine.jsonl"),
        builder=external_winner,
        reward=None,
        judge=None,
        prompts=None,
        max_bad_fraction=0.0,
        stream=None,
    )

    told: list[str] = []

    def start() -> list[str]:
        run = Run(config.directory, plain(config))
        check_origins(run, config, inputs)
        run.step("one", dict)
        new = run.state["events"][len(told) :]
        told.extend(new)
        return new

    assert start() == []
    return start


def change_value(model) -> None:
    tensors = load_file(model / WEIGHTS)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, model / WEIGHTS)


def change_dtype(model) -> None:
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(model / WEIGHTS).items()}, model / WEIGHTS)


def change_settings(model) -> None:
    settings = json.loads((model / "config.json").read_text())
    settings["decoder_config"]["heads"] *= 2
    (model / "config.json").write_text(json.dumps(settings))


def change_tokenizer(model) -> None:
    path = model / "tokenizer.json"
    path.write_text(path.read_text().replace("Whitespace", "Digits") + " ")


@pytest.mark.parametrize("change", [change_value, change_dtype, change_settings, change_tokenizer])
def test_another_starting_model_is_refused(begun, tmp_path, change):
    change(tmp_path / "model")
    for _ in range(2):
        with pytest.raises(
            ValueError, match=rf"^checkpoint={tmp_path}/model: .* have changed since {tmp_path}/run was"
        ):
            begun()


def test_the_same_model_may_be_saved_and_moved(begun, tmp_path):
    model = tmp_path / "model"
    save_file(load_file(model / WEIGHTS), model / WEIGHTS)
    (model / "README.md").write_text("more")
    assert begun() == []


def test_other_files_that_changed_are_noted_once(begun, tmp_path):
    (tmp_path / "prompts.txt").write_text("a blue circle\n")
    assert begun() == ["preference.prompts has changed since the last start: later steps read it as it is now"]
    assert begun() == []


@pytest.mark.parametrize("damage", ['"origins": {', '"checkpoint": "'])
def test_damaged_hashes_are_named_and_taken_anew(begun, tmp_path, damage):
    path = tmp_path / "run" / "state.json"
    text = path.read_text()
    assert text.count(damage) >= 1
    path.write_text(text.replace(damage, damage.replace("i", "j").replace("c", "d"), 1))
    assert f"{path}: the hashes of the run's inputs are damaged and taken anew" in begun()
    assert begun() == []
