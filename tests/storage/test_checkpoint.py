"""Weight sets on disk: whole or not there."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.faults import ask
from vargpt_rl.common.failpoints import VARIABLE
from vargpt_rl.storage import checkpoint
from vargpt_rl.storage.checkpoint import (
    MARKER,
    WEIGHTS,
    check_checkpoint,
    load_weights_into,
    recorded_hashes,
    save_checkpoint,
)
from vargpt_rl.storage.files import write_atomically
from vargpt_rl.storage.hashes import file_hashes


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


@pytest.fixture
def tensors():
    return {"0.weight": torch.ones(4, 3), "1.bias": torch.full((2,), 2.0)}


@pytest.fixture
def saved(tmp_path, tensors):
    return save_checkpoint(tmp_path / "final", tensors)


def test_what_was_saved_is_loaded(saved, tensors):
    loaded = load_file(check_checkpoint(saved))
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert [path.name for path in saved.parent.iterdir()] == ["final"], "nothing temporary is left"


def test_views_are_saved_by_their_content(tmp_path):
    transposed = torch.arange(6.0).view(2, 3).T
    directory = save_checkpoint(tmp_path / "made" / "here", {"a": transposed})
    assert torch.equal(load_file(check_checkpoint(directory))["a"], transposed)


@pytest.mark.parametrize("step", ["save_file", "tensor_hash"])
def test_a_save_that_dies_leaves_the_old_checkpoint(saved, tensors, monkeypatch, step):
    whole = getattr(checkpoint, step)

    def die(*args):
        if step == "save_file":
            args[1].write_bytes(b"half")
        raise KeyboardInterrupt

    before = (saved / WEIGHTS).read_bytes()
    monkeypatch.setattr(checkpoint, step, die)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(saved, {name: tensor * 3 for name, tensor in tensors.items()})
    assert check_checkpoint(saved).read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved], "nothing half written is left"
    monkeypatch.setattr(checkpoint, step, whole)
    save_checkpoint(saved, {"0.weight": tensors["0.weight"] * 3})
    assert load_file(check_checkpoint(saved))["0.weight"].unique().tolist() == [3.0]


@pytest.mark.parametrize("moment", ["unmarked", "written", "removed", "there"])
def test_a_save_that_is_killed_at_any_step_leaves_one_whole_checkpoint_or_none(tmp_path, tensors, monkeypatch, moment):
    old = save_checkpoint(tmp_path / "stage/final", tensors)
    new = {name: tensor * 3 for name, tensor in tensors.items()}
    file = ask(tmp_path / "faults", f"stage/final/{moment}")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "faults"))
    if (child := os.fork()) == 0:
        save_checkpoint(old, new)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL and not file.exists()
    if moment == "removed":
        assert not old.exists(), "the one moment with none under its name; the new one is whole beside it"
        assert load_file(check_checkpoint(old.with_name(".final")))["1.bias"].tolist() == [6.0, 6.0]
    else:
        found = load_file(check_checkpoint(old))["1.bias"].tolist()
        assert found == ([6.0, 6.0] if moment == "there" else [2.0, 2.0])
    save_checkpoint(old, new)
    assert load_file(check_checkpoint(old))["1.bias"].tolist() == [6.0, 6.0]
    assert os.listdir(old.parent) == ["final"], "nothing is left of the one that was killed"


@pytest.mark.parametrize("checked", [True, False])
def test_a_full_disk_is_named_and_costs_nothing(small_disk, tensors, monkeypatch, checked):
    """With and without the check of free space: another process may take it in the meantime."""
    old = save_checkpoint(small_disk / "stage/final", tensors)
    if not checked:
        monkeypatch.setattr(checkpoint, "check_free_space", lambda folder, needed: None)
    with pytest.raises(OSError, match="needs 40,000,000 bytes: the disk has [0-9,]+" if checked else "No space left"):
        save_checkpoint(old, {"large": torch.zeros(10_000_000)})
    assert check_checkpoint(old) and os.listdir(old.parent) == ["final"], "no half of the new one fills the disk"
    with pytest.raises(OSError, match="No space left"):
        write_atomically(old / MARKER, bytes(40_000_000))
    assert check_checkpoint(old) and set(os.listdir(old)) == {MARKER, WEIGHTS}


@pytest.mark.parametrize("missing", [MARKER, WEIGHTS])
def test_an_incomplete_checkpoint_is_named(saved, missing):
    (saved / missing).unlink()
    with pytest.raises(ValueError, match=rf"checkpoint {saved}: incomplete, expected {WEIGHTS} and {MARKER}"):
        check_checkpoint(saved)


@pytest.mark.parametrize("damage", ["byte", "length"])
def test_changed_bytes_are_noticed_and_named(saved, damage):
    data = bytearray((saved / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (saved / WEIGHTS).write_bytes(data if damage == "byte" else data[:-1])
    with pytest.raises(ValueError, match=f"checkpoint {saved}: .*is corrupt"):
        check_checkpoint(saved)
    with pytest.raises(ValueError, match=f"checkpoint {saved}"):
        load_weights_into(model(), [saved])


def test_a_changed_tensor_is_named(saved, tensors):
    save_file(tensors | {"1.bias": torch.zeros(2)}, saved / WEIGHTS)
    with pytest.raises(ValueError, match="the hashes of 1 tensors differ from COMPLETE, among them that of 1.bias"):
        check_checkpoint(saved)


def test_a_marker_without_tensor_hashes_is_refused(saved):
    (saved / MARKER).write_text('{"bytes": 9, "blake2b": "00"}')
    with pytest.raises(ValueError, match="COMPLETE is corrupt, expected bytes and xxh3_128, hashes of tensors"):
        check_checkpoint(saved)


def test_recorded_hashes_are_those_of_the_file(saved):
    assert recorded_hashes(saved / WEIGHTS) == file_hashes(saved / WEIGHTS)


def test_weight_sets_are_copied_in_place_and_in_order(tmp_path, saved):
    taker = model()
    kept = taker[0].bias.clone()
    at = taker[0].weight.data_ptr()
    later = save_checkpoint(tmp_path / "later", {"1.bias": torch.zeros(2)})
    load_weights_into(taker, [saved, later])
    assert taker[0].weight.data_ptr() == at
    assert taker[0].weight.unique().tolist() == [1.0]
    assert taker[1].bias.tolist() == [0.0, 0.0], "the later set wins"
    assert torch.equal(taker[0].bias, kept)
    assert taker[0].weight.requires_grad


def test_tensors_that_do_not_fit_are_named(tmp_path):
    stranger = save_checkpoint(tmp_path / "stranger", {"2.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"{stranger}.*2.weight of shape \(1,\), the model has no such tensor"):
        load_weights_into(model(), [stranger])
    wide = save_checkpoint(tmp_path / "wide", {"1.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=rf"{wide}.*1.bias of shape \(3,\), the model has \(2,\)"):
        load_weights_into(model(), [wide])


def test_a_file_is_replaced_at_once(tmp_path):
    path = tmp_path / "state.json"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]
