"""Ablations: what starts anew, which work is shared between variants, and the table."""

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.driver import stage_context
from vargpt_rl.bench import ablations
from vargpt_rl.bench.ablations import (
    FULL,
    VARIANTS,
    Variant,
    markdown,
    random_start,
    run_all,
    settings_of,
)
from vargpt_rl.driver.session import StageContext
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.stages import STAGES, freeze
from vargpt_rl.storage.checkpoint import check_checkpoint


def test_all_that_a_stage_trains_is_set_and_what_joins_the_parts_is_anew(checkpoint, tmp_path):
    model = Vargpt.from_pretrained(checkpoint)
    names = {name for name, _ in model.named_parameters()}
    start = load_file(check_checkpoint(random_start(str(checkpoint), tmp_path / "start", seed=1)))
    assert start.keys() == {name for name in names if not name.startswith("image_tokenizer.")}
    assert all(set(freeze(model, STAGES[stage])) <= start.keys() for stage in FULL)
    own = dict(model.named_parameters())
    other = {name for name, tensor in start.items() if not torch.equal(tensor, own[name])}
    # Biases begin at zero and norms at one, in a fresh model as in this one.
    assert {name for name in other if name.endswith("weight")} == {
        name for name in start if name.startswith(ablations.RANDOM) and own[name].ndim == 2
    }
    again = load_file(check_checkpoint(random_start(str(checkpoint), tmp_path / "again", seed=1)))
    assert all(torch.equal(start[name], again[name]) for name in start)


RESULTS = {
    "drawings": {"overall": 0.5, "overall_stderr": 0.25},
    "images": {"nats": 0.25, "nats_stderr": 0.002},
    "questions": {"accuracy": 0.75, "accuracy_stderr": 0.125},
}


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Run the variants with steps that only note their run, their name and the weights of the policy they are given."""
    log = []

    def record(self, step, work, policy):
        weights = [str(path.parent.relative_to(tmp_path)) for path in policy.weights]
        log.append((self.run.directory.name, step or self.name, weights))
        return RESULTS.get(step, {})

    monkeypatch.setattr(StageContext, "step", record)
    session = stage_context(tmp_path).session
    opened = []
    monkeypatch.setattr(ablations, "place", lambda own, inputs, run: None)
    monkeypatch.setattr(ablations, "open_session", lambda *given: opened.append(given) or session)
    monkeypatch.setattr(ablations, "random_start", lambda *given: tmp_path / "start/final")
    configs = {variant: settings_of(variant, tmp_path, []) for variant in VARIANTS}
    table = run_all(configs, session.inputs, tmp_path)
    assert len(opened) == 1, "all variants share one set of workers and ranks"
    assert (tmp_path / "ablations.md").read_text() == table
    return log, table


def test_equal_work_is_trained_once(ran):
    log, table = ran
    assert [(run, step) for run, step, _ in log if step in FULL] == [
        ("full-recipe", "pretrain"),
        ("full-recipe", "understanding"),
        ("full-recipe", "sft"),
        ("without-pretraining", "understanding"),
        ("without-pretraining", "sft"),
        ("without-understanding-SFT", "sft"),
        ("frozen-projectors-in-SFT", "sft"),
        ("frozen-decoder-in-SFT", "sft"),
    ]
    assert table.count("\n") == 2 + len(VARIANTS)
    assert "| full recipe | 240 |" in table and "| without pretraining | 180 |" in table


def test_variants_are_measured_with_the_weights_of_their_own_stages(ran):
    log, _ = ran
    measured = {run: weights for run, step, weights in log if step == "drawings"}
    shared = ["start", "full-recipe/checkpoints/pretrain", "full-recipe/checkpoints/understanding"]
    assert measured["full-recipe"] == [*shared, "full-recipe/checkpoints/iter-00-sft"]
    assert measured["without-SFT"] == shared
    assert measured["frozen-decoder-in-SFT"] == [*shared, "frozen-decoder-in-SFT/checkpoints/iter-00-sft"]
    assert measured["without-understanding-SFT"] == [
        *shared[:2],
        "without-understanding-SFT/checkpoints/iter-00-sft",
    ]
    trained = {(run, step): weights for run, step, weights in log}
    assert trained["without-pretraining", "understanding"] == ["start"]


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


@pytest.mark.parametrize("argument", ["sft.stpes=1", "data.kind=other", "checkpoint=nowhere"])
def test_bad_settings_are_one_line(argument, capsys):
    assert ablations.main([argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
