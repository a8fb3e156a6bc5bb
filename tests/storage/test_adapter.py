"""Adapters on disk: first weights without effect, and folders to share that peft loads and that know their base."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from vargpt_rl.convert import Conversion, Target, convert
from vargpt_rl.inference.conversation import load
from vargpt_rl.model.adapter import AdapterConfig, is_adapter
from vargpt_rl.model.families import load_model
from vargpt_rl.stages import STAGES, freeze
from vargpt_rl.storage.adapter import (
    adapted_on_meta,
    adapter_base,
    base_hash,
    merged_tensors,
    write_adapter,
    write_fresh_adapter,
    write_merged,
)
from vargpt_rl.storage.checkpoint import Policy, check_checkpoint, load_fused, load_policy, save_checkpoint
from vargpt_rl.storage.export import export_model
from vargpt_rl.storage.sharded import save_sharded, stored_in_folder

LORA = AdapterConfig("lora", rank=4, targets=["language_model", "image_decoder"], full=["projectors"])


@pytest.fixture
def fresh(family, tmp_path) -> Policy:
    """A policy with an adapter without effect."""
    found = write_fresh_adapter(str(family.checkpoint), LORA, tmp_path / "adapter", 0, torch.float32)
    assert found["tensors"] == len(load_file(check_checkpoint(tmp_path / "adapter")))
    return Policy(str(family.checkpoint), (tmp_path / "adapter",), LORA)


def test_the_first_weights_cover_what_stages_train(fresh):
    names = load_file(check_checkpoint(fresh.weights[0])).keys()
    model = adapted_on_meta(fresh.model, LORA)
    for stage in ("sft", "dpo", "understanding", "edit"):
        assert set(freeze(model, STAGES[stage], LORA)) <= names
    assert all(is_adapter(name) or name.startswith("projector_") for name in names)


def test_the_first_weights_leave_the_model_as_it_is(fresh):
    base = load_model(fresh.model, torch.float32).state_dict()
    fused = load_fused(fresh, torch.float32).state_dict()
    assert fused.keys() == base.keys() and all(torch.equal(tensor, base[name]) for name, tensor in fused.items())


def test_a_policy_is_loaded_with_its_adapter_beside_the_weights(fresh):
    model = load_policy(fresh, torch.float32)
    first = load_file(check_checkpoint(fresh.weights[0]))
    own = model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in first.items())
    assert fresh.plus(fresh.weights[0]).adapter is LORA


@pytest.fixture
def tuned(fresh, tmp_path) -> Policy:
    """A policy whose adapter, and whose parts in full, have moved."""
    torch.manual_seed(0)
    tensors = {
        name: tensor + 0.05 * torch.randn_like(tensor)
        for name, tensor in load_file(check_checkpoint(fresh.weights[0])).items()
    }
    return fresh.plus(save_checkpoint(tmp_path / "tuned", tensors))


@pytest.fixture
def shared(tuned, tmp_path) -> Path:
    """The adapter's folder."""
    write_adapter(tuned, tmp_path / "shared", tuned.model)
    return tmp_path / "shared"


def test_peft_loads_a_shared_adapter(tuned, shared):
    base = load_model(tuned.model, torch.float32)
    theirs = PeftModel.from_pretrained(base, shared).merge_and_unload().state_dict()
    ours = load_fused(tuned, torch.float32).state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-5, msg=name)
    assert (ours["projector_in.fc1.weight"] != load_model(tuned.model, torch.float32).projector_in.fc1.weight).all()


def test_a_shared_adapter_is_a_checkpoint(tuned, shared, tmp_path):
    ours = load_fused(tuned, torch.float32).state_dict()
    model, chat = load(shared, "cpu", "fp32")
    assert all(torch.equal(tensor, ours[name]) for name, tensor in model.state_dict().items())
    assert chat.tokenizer.get_vocab() == load(tuned.model, "cpu", "fp32")[1].tokenizer.get_vocab()
    written = load_model(write_merged(shared, tmp_path / "merged"), "auto").state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in written.items())
    card = (shared / "README.md").read_text()
    assert f"base_model: {tuned.model}" in card and "rank 4" in card and base_hash(Path(tuned.model)) in card
    export_model(tuned, tmp_path / "model")
    exported = load_model(tmp_path / "model", "auto").state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in exported.items())


def test_a_shared_adapter_takes_no_file_from_outside_the_model(tuned, tmp_path):
    model = shutil.copytree(tuned.model, tmp_path / "start")
    (tmp_path / "private").write_text("{}")
    (model / "tokenizer_config.json").unlink()
    (model / "tokenizer_config.json").symlink_to(tmp_path / "private")
    with pytest.raises(ValueError, match="tokenizer_config.json: expected a plain file of the model"):
        write_adapter(replace(tuned, model=str(model)), tmp_path / "shared", "start")
    assert not (tmp_path / "shared").exists()


def test_a_shared_adapter_becomes_a_release(shared, tmp_path):
    convert(Conversion(str(shared), str(tmp_path / "merged"), Target.hf))
    convert(Conversion(str(tmp_path / "merged"), str(tmp_path / "twice"), Target.release))
    convert(Conversion(str(shared), str(tmp_path / "once"), Target.release))
    files = sorted(path.name for path in (tmp_path / "twice").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "once").iterdir())
    assert all((tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes() for name in files)
    assert not list(tmp_path.glob(".*")), "the merged model is gone"


def spoil(shared: Path, file: str, **changes) -> None:
    path = shared / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "changes", "told"),
    [
        ("base.json", {"model_type": "other"}, "an adapter of the family 'other', but its base .* is of"),
        ("base.json", {"xxh3_128": "0"}, "has hash .*, expected 0: the adapter was trained on other weights"),
        ("adapter_config.json", {"base_model_name_or_path": "/nowhere"}, "base_model_name_or_path=/nowhere: no such"),
        ("adapter_config.json", {"use_dora": True}, "use_dora is True, expected False"),
        ("adapter_config.json", {"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(shared, file, changes, told):
    spoil(shared, file, **changes)
    with pytest.raises(ValueError, match=told) as error:
        adapter_base(shared)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=told):
        load(shared, "cpu", "fp32")


def test_an_adapter_of_another_base_is_refused(family, shared, tmp_path):
    other = family.make(tmp_path / "other", 1)
    spoil(shared, "adapter_config.json", base_model_name_or_path=str(other))
    with pytest.raises(ValueError, match="was trained on other weights"):
        load(shared, "cpu", "fp32")


def test_the_base_hash_is_that_of_values(family, tmp_path):
    base = Path(family.checkpoint)
    copied = shutil.copytree(base, tmp_path / "copy")
    (copied / "model.safetensors").unlink()
    save_sharded(stored_in_folder(base), copied)
    assert base_hash(copied) == base_hash(base) != base_hash(Path(family.make(tmp_path / "other", 1)))


def test_misfit_tensors_of_an_adapter_are_named(tuned, shared):
    path = shared / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_A" in name)
    for changed, told in (
        ({k: v for k, v in tensors.items() if k != name}, "is not one of a pair"),
        (tensors | {name: tensors[name][:, 1:].contiguous()}, "the base has"),
        (tensors | {"base_model.model.nobody.weight": torch.zeros(2)}, "the base has no nobody.weight"),
    ):
        save_file(changed, path)
        with pytest.raises(ValueError, match=told):
            merged_tensors(shared, Path(tuned.model))
