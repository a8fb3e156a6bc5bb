"""Ablations: what starts anew, which work is shared between variants, and the table."""

from pathlib import PurePosixPath
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from configs.load import load_config
from vargpt_rl.bench import ablations
from vargpt_rl.bench.ablations import (
    FULL,
    SETTINGS,
    VARIANTS,
    Variant,
    markdown,
    run_all,
    run_variant,
    settings_of,
    start_anew,
)
from vargpt_rl.driver.run import Run
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.stages import STAGES, freeze
from vargpt_rl.storage.checkpoint import check_checkpoint


def test_all_that_a_stage_trains_is_set_and_what_joins_the_parts_is_anew(checkpoint, tmp_path):
    model = Vargpt.from_pretrained(checkpoint)
    names = {name for name, _ in model.named_parameters()}
    start = load_file(check_checkpoint(start_anew(str(checkpoint), tmp_path / "start", seed=1)))
    assert start.keys() == {name for name in names if not name.startswith("image_tokenizer.")}
    assert all(set(freeze(model, STAGES[stage])) <= start.keys() for stage in FULL)
    own = dict(model.named_parameters())
    other = {name for name, tensor in start.items() if not torch.equal(tensor, own[name])}
    # Biases begin at zero and norms at one, in a fresh model as in this one.
    assert {name for name in other if name.endswith("weight")} == {
        name for name in start if name.startswith(ablations.ANEW) and own[name].ndim == 2
    }
    again = load_file(check_checkpoint(start_anew(str(checkpoint), tmp_path / "again", seed=1)))
    assert all(torch.equal(start[name], again[name]) for name in start)


class RecordingSteps:
    """Stands in for the steps: notes what is trained from which weights."""

    name, resolution = "iter-00", 128

    def __init__(self, variant: str, config, log: list):
        self.variant, self.settings, self.config, self.weights, self.log = variant, config, config, ("start",), log

    def begin(self, iteration, resolution):
        assert (iteration, resolution) == (0, 128)

    def checkpoint(self, key):
        return PurePosixPath(self.variant, key)

    def __getattr__(self, stage):
        def train():
            self.log.append((self.variant, stage, self.weights))
            return {}

        return train

    def draws(self):
        return {"overall": 0.5, "overall_stderr": 0.25, "weights": [str(weights) for weights in self.weights]}

    def predicts(self):
        return {"nats": 0.25, "nats_stderr": 0.002}

    def understands(self):
        return {"accuracy": 0.75, "accuracy_stderr": 0.125}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder, log, trained, results = tmp_path_factory.mktemp("runs"), [], {}, []
    config = load_config(SETTINGS)
    for variant in VARIANTS:
        run = Run(folder / variant.name, {})
        results.append(run_variant(variant, RecordingSteps(variant.name, config, log), run, trained))
    return log, results


def test_a_stage_that_comes_out_the_same_is_trained_once(ran):
    log, _ = ran
    assert [(variant, stage) for variant, stage, _ in log] == [
        ("full recipe", "pretrain"),
        ("full recipe", "understanding"),
        ("full recipe", "sft"),
        ("without pretraining", "understanding"),
        ("without pretraining", "sft"),
        ("without understanding SFT", "sft"),
        ("frozen projectors in SFT", "sft"),
        ("frozen decoder in SFT", "sft"),
    ]


def test_every_variant_is_measured_with_the_weights_of_its_own_stages(ran):
    log, results = ran
    assert [result["variant"] for result in results] == [variant.name for variant in VARIANTS]
    weights = {result["variant"]: result["drawings"]["weights"] for result in results}
    shared = ["start", "full recipe/pretrain/final", "full recipe/understanding/final"]
    assert weights["full recipe"] == [*shared, "full recipe/iter-00-sft/final"]
    assert weights["without SFT"] == shared
    assert weights["frozen decoder in SFT"] == [*shared, "frozen decoder in SFT/iter-00-sft/final"]
    assert weights["without understanding SFT"] == [*shared[:2], "without understanding SFT/iter-00-sft/final"]
    froms = {(variant, stage): list(found) for variant, stage, found in log}
    assert froms["without pretraining", "understanding"] == ["start"]
    steps = {result["variant"]: result["steps"] for result in results}
    assert steps["full recipe"] == steps["frozen decoder in SFT"] == 60 + 60 + 120
    assert steps["without pretraining"] == 60 + 120


def test_variants_are_settings_of_the_loop(tmp_path):
    frozen = {v.name: settings_of(v, tmp_path, ["seed=3"]).sft.frozen for v in VARIANTS}
    assert frozen["frozen projectors in SFT"] == ["projector_in", "projector_out"]
    assert frozen["frozen decoder in SFT"] == ["image_decoder"] and frozen["full recipe"] == []
    assert settings_of(VARIANTS[0], tmp_path, []).directory == tmp_path / "full-recipe"
    assert Variant("a", FULL, ("sft.frozen=[]",)).prefix(2) == Variant("b", FULL).prefix(2)
    assert Variant("a", FULL, ("sft.frozen=[]",)).prefix(3) != Variant("b", FULL).prefix(3)


def test_the_table_is_markdown():
    result = {
        "variant": "full recipe",
        "steps": 240,
        "drawings": {"overall": 0.5, "overall_stderr": 0.04},
        "images": {"nats": 0.25, "nats_stderr": 0.002},
        "questions": {"accuracy": 0.25, "accuracy_stderr": 0.02},
    }
    assert markdown([result]).splitlines() == [
        "| variant | steps | drawings right | nats a bit of images | questions right |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| full recipe | 240 | 0.500 ± 0.040 | 0.2500 ± 0.0020 | 0.250 ± 0.020 |",
    ]


def test_all_variants_share_one_set_of_workers_and_a_table_is_kept(monkeypatch, tmp_path):
    placements, log = [], []
    monkeypatch.setattr(ablations, "nodes", lambda: [{"CPU": 2.0}])
    monkeypatch.setattr(ablations, "RolloutPool", lambda config, placement, *rest: placements.append(placement))
    monkeypatch.setattr(ablations, "LearnerGroup", lambda *given: None)
    monkeypatch.setattr(ablations, "Rollouts", lambda *given: None)
    monkeypatch.setattr(ablations, "start_anew", lambda *given: tmp_path / "start")
    monkeypatch.setattr(ablations, "Steps", lambda own, run, *rest: RecordingSteps(run.directory.name, own, log))
    configs = {variant: settings_of(variant, tmp_path, ["rollout.workers=1"]) for variant in VARIANTS[:2]}
    table = run_all(configs, SimpleNamespace(model="", source=None, quarantine=None), tmp_path)
    assert [placement.workers for placement in placements] == [1]
    assert table.count("\n") == 4 and (tmp_path / "ablations.md").read_text() == table


@pytest.mark.parametrize("argument", ["sft.stpes=1", "data.kind=other", "checkpoint=nowhere"])
def test_bad_settings_are_one_line(argument, capsys):
    assert ablations.main([argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
