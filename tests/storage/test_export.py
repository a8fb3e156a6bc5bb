"""Models as directories: written whole, and the best of several kept."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.storage import export
from vargpt_rl.storage.checkpoint import Policy, save_checkpoint
from vargpt_rl.storage.export import export_model, files_beside_weights, keep_best, read_best


@pytest.fixture
def policies(checkpoint, tmp_path):
    """Two weight sets of one tensor, and the name of it."""
    model = Vargpt.from_pretrained(checkpoint)
    name, tensor = next((name, p.detach()) for name, p in model.named_parameters() if name.startswith("image_decoder"))
    return name, [save_checkpoint(tmp_path / f"set-{i}", {name: torch.full_like(tensor, i)}) for i in range(2)]


def note(value: float, iteration: int = 0) -> dict:
    return {"metric": "after_dpo.overall", "value": value, "iteration": iteration, "resolution": 32}


def test_the_best_is_the_model_that_was_measured(checkpoint, policies, tmp_path):
    name, sets = policies
    policy = Policy(str(checkpoint), tuple(sets))
    keep_best(policy, tmp_path / "best", note(0.5))
    export_model(policy, tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {path.name for path in (tmp_path / "best").iterdir()} == names | {"best.json"}
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("best", "model")]
    assert weights[0] == weights[1]
    assert (Vargpt.from_pretrained(tmp_path / "best").get_parameter(name) == 1).all()
    assert json.loads((tmp_path / "best/best.json").read_text()) == note(0.5)


def test_only_known_files_of_the_model_are_copied(checkpoint, tmp_path):
    start = Path(shutil.copytree(checkpoint, tmp_path / "start"))
    os.mkfifo(start / "pipe")
    (start / "dangling").symlink_to("nowhere")
    (start / "self").symlink_to("self")
    (tmp_path / "secret").write_text("a key")
    (start / "id_rsa").symlink_to(tmp_path / "secret")
    (start / "outside").symlink_to(tmp_path)
    (start / "notes.txt").write_text("mine")
    export_model(Policy(str(start)), tmp_path / "model")
    export_model(Policy(str(checkpoint)), tmp_path / "plain")
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert {path.name for path in (tmp_path / "model").iterdir()} == names and "tokenizer.json" in names


@pytest.mark.parametrize("what", ["link", "dangling", "pipe", "folder"])
def test_known_files_that_lead_elsewhere_are_refused(checkpoint, tmp_path, what):
    start = Path(shutil.copytree(checkpoint, tmp_path / "start"))
    (tmp_path / "secret").write_text("a key")
    file = start / "merges.txt"
    match what:
        case "link":
            file.symlink_to(tmp_path / "secret")
        case "dangling":
            file.symlink_to("nowhere")
        case "pipe":
            os.mkfifo(file)
        case "folder":
            file.mkdir()
    with pytest.raises(ValueError, match=r"merges.txt: expected a plain file"):
        files_beside_weights(start)
    file.unlink() if what != "folder" else file.rmdir()
    (start / "own").write_text("")
    file.symlink_to("own")
    assert file in files_beside_weights(start)


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    root = tmp_path / "models--org--name"
    (root / "blobs").mkdir(parents=True)
    (root / "blobs" / "abc").write_text("{}")
    snapshot = root / "snapshots" / "commit"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    assert files_beside_weights(snapshot) == [snapshot / "config.json"]


def test_only_a_strictly_better_one_replaces_it(monkeypatch, tmp_path):
    exported = []

    def fake_export(policy, target, notes):
        target.mkdir(exist_ok=True)
        (target / export.BEST).write_text(json.dumps(notes[export.BEST]))
        exported.append(notes[export.BEST]["value"])

    monkeypatch.setattr(export, "export_model", fake_export)
    for iteration, value in enumerate([0.5, 0.5, 0.4, float("nan"), 0.6, float("inf"), 0.6]):
        keep_best(Policy("start"), tmp_path / "best", note(value, iteration))
        assert read_best(tmp_path / "best")["iteration"] == (0 if iteration < 4 else 4)
    assert exported == [0.5, 0.6]


def test_nan_is_never_the_best(tmp_path):
    keep_best(Policy("nowhere"), tmp_path / "best", note(float("nan")))
    assert read_best(tmp_path / "best") is None


def test_one_that_was_being_replaced_is_not_lost(tmp_path):
    old = tmp_path / ".best.old"
    old.mkdir()
    (old / "best.json").write_text(json.dumps(note(0.9)))
    keep_best(Policy("nowhere"), tmp_path / "best", note(0.8, iteration=1))
    assert read_best(tmp_path / "best") == note(0.9) and not old.exists()


def test_what_was_there_stays_until_the_new_is_whole(checkpoint, tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(ValueError, match="incomplete"):
        export_model(Policy(str(checkpoint), (tmp_path / "nothing",)), target)
    assert [path.name for path in target.iterdir()] == ["old"]
    export_model(Policy(str(checkpoint)), target)
    assert not (target / "old").exists() and (target / "model.safetensors").exists()
    assert not list(tmp_path.glob(".model*"))
