"""Release and model directory, one into the other: nothing is lost, no fault passes, no failure leaves anything."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vargpt_rl.common.command import run_command
from vargpt_rl.convert import RELEASE_CONFIG, UNUSED, Conversion, convert
from vargpt_rl.model.configuration import VargptConfig
from vargpt_rl.model.hub import EMBEDDED
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.release.v1_1_config import sizes_of, to_release_config
from vargpt_rl.release.v1_1_names import START_ROWS, dropped_shapes, from_release, release_name, start_rows_shape
from vargpt_rl.storage import sharded as shards

GOLDEN = Path(os.environ.get("VARGPT_GOLDEN", Path(__file__).parents[2] / "shared/golden/v1_1_tiny"))
BLOCKS_PER_CHUNK = 2
INDEX = "model.safetensors.index.json"


def run(source: Path, target: Path, to: str) -> int:
    return run_command(Conversion, convert, [f"source={source}", f"target={target}", f"to={to}"])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a directory, by its index if it has one."""
    if (folder / INDEX).exists():
        files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def split(tensors: dict[str, torch.Tensor], folder: Path, files: int = 2) -> None:
    """Write tensors as shards with an index."""
    names, weight_map = sorted(tensors), {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        shard = names[number::files]
        save_file({name: tensors[name].contiguous() for name in shard}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture(scope="module")
def release(checkpoint, tmp_path_factory):
    """A directory as the release is one: sharded bf16, with values of its own where this model has no place."""
    folder = tmp_path_factory.mktemp("release")
    config = VargptConfig.from_pretrained(checkpoint)
    sizes = sizes_of(config, BLOCKS_PER_CHUNK)
    tensors = {release_name(name, *sizes): tensor.bfloat16() for name, tensor in weights(checkpoint).items()}
    start = tensors.pop(START_ROWS)
    generator = torch.Generator().manual_seed(0)
    unused = dropped_shapes(config, BLOCKS_PER_CHUNK) | {START_ROWS: start_rows_shape(config)}
    tensors |= {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in unused.items()}
    tensors[START_ROWS][-1] = start
    tensors["vae_local.quantizer.lfq.mask"] = 2 ** torch.arange(config.image_tokenizer_config.bits)
    split(tensors, folder)
    settings = to_release_config(config, torch.bfloat16) | {"a_key_of_its_own": [1, 2]}
    (folder / "config.json").write_text(json.dumps(settings, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(checkpoint / name, folder)
    (folder / "chat_template.json").write_text("{}")
    (folder / "generation_config.json").write_text(json.dumps({"special_tokens": {"image_gen_start": "<|x|>"}}))
    return folder


@pytest.fixture(scope="module")
def converted(release, tmp_path_factory):
    target = tmp_path_factory.mktemp("converted") / "hf"
    assert run(release, target, "hf") == 0
    return target


def test_the_model_loads_with_every_key_and_no_other(converted, release, checkpoint):
    model, report = Vargpt.from_pretrained(converted, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.bfloat16
    original = Vargpt.from_pretrained(checkpoint).bfloat16()
    assert_same(model.state_dict(), original.state_dict())
    config, expected = model.config, original.config
    assert config.text_config.rope_parameters == expected.text_config.rope_parameters
    for name in ("image_token_id", "image_gen_start_token_id", "image_gen_pad_token_id", "vision_end_token_id"):
        assert getattr(config, name) == getattr(expected, name)
    for name in ("tokenizer.json", "preprocessor_config.json", "chat_template.json", "generation_config.json"):
        assert (converted / name).read_bytes() == (release / name).read_bytes()


def test_what_the_model_has_no_place_for_is_kept_aside_with_its_reason(converted, release, capsys, tmp_path):
    kept = load_file(converted / UNUSED)
    original = weights(release)
    assert_same(kept, {name: original[name] for name in kept})
    with safe_open(converted / UNUSED, framework="pt") as file:
        reasons = json.loads(file.metadata()["reasons"])
    assert reasons.keys() == kept.keys()
    assert run(release, tmp_path / "again", "hf") == 0
    printed = capsys.readouterr().out
    counts = {reason: int(count) for count, reason in re.findall(r"^ *(\d+) (.*)$", printed, re.MULTILINE)[1:]}
    assert counts == {reason: list(reasons.values()).count(reason) for reason in reasons.values()}


def test_there_and_back_is_the_same(release, converted, tmp_path):
    assert run(converted, tmp_path / "back", "release") == 0
    assert_same(weights(tmp_path / "back"), weights(release))
    assert (tmp_path / "back/config.json").read_bytes() == (release / "config.json").read_bytes()


@pytest.mark.parametrize("model", ["embedded", "checkpoint"])
def test_back_and_there_is_the_same_for_a_model_that_never_was_a_release(model, request, tmp_path, capsys):
    source = EMBEDDED if model == "embedded" else request.getfixturevalue("checkpoint")
    assert run(source, tmp_path / "release", "release") == 0
    assert f"there is no {UNUSED}" in capsys.readouterr().out
    made_up = weights(tmp_path / "release")
    assert made_up["vae_local.quantizer.lfq.mask"].tolist()[-3:] == [4, 2, 1]
    assert not made_up[START_ROWS][:-1].any()
    assert run(tmp_path / "release", tmp_path / "hf", "hf") == 0
    assert_same(weights(tmp_path / "hf"), weights(source))
    ours, theirs = VargptConfig.from_pretrained(tmp_path / "hf"), VargptConfig.from_pretrained(source)
    for name in ("text_config", "vision_config", "decoder_config", "image_tokenizer_config"):
        left, right = getattr(ours, name).to_dict(), getattr(theirs, name).to_dict()
        assert left | {"dtype": None} == right | {"dtype": None}


@pytest.mark.parametrize("beside_its_sidecar", [True, False])
def test_a_model_saved_anew_goes_back_too(release, converted, tmp_path, beside_its_sidecar):
    saved = tmp_path / "saved"
    if beside_its_sidecar:
        saved.mkdir()
        for name in (UNUSED, RELEASE_CONFIG):
            shutil.copy(converted / name, saved)
    model = Vargpt.from_pretrained(converted, dtype="auto")
    with torch.no_grad():
        model.image_decoder.condition.start_embedding += 1
    model.save_pretrained(saved, max_shard_size="200KB")
    assert len(list(saved.glob("model-*.safetensors"))) > 1
    assert run(saved, tmp_path / "back", "release") == 0
    ours, theirs = weights(tmp_path / "back"), weights(release)
    assert torch.equal(ours[START_ROWS][-1], theirs[START_ROWS][-1] + 1)
    ours[START_ROWS][-1] = theirs[START_ROWS][-1]
    if beside_its_sidecar:
        assert_same(ours, theirs)
    else:
        words = "model.embed_tokens.weight"
        assert torch.equal(ours[words], theirs[words]) and len(ours) == len(theirs)


def test_a_shard_is_one_tensor_or_stays_within_the_limit(release, tmp_path, monkeypatch):
    limit = 1 << 12
    monkeypatch.setattr(shards, "SHARD", limit)
    assert run(release, tmp_path / "hf", "hf") == 0
    tensors = weights(tmp_path / "hf")
    assert_same(
        tensors, {name: tensors[name] for name in json.loads((tmp_path / "hf" / INDEX).read_text())["weight_map"]}
    )
    for file in (tmp_path / "hf").glob("model-*.safetensors"):
        shard = load_file(file)
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= limit


def failure(source: Path, target: Path, to: str, capsys) -> str:
    """The message of a conversion that must fail, and must leave nothing."""
    before = sorted(target.parent.iterdir())
    assert run(source, target, to) == 2
    assert sorted(target.parent.iterdir()) == before
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


@pytest.mark.parametrize("to", ["hf", "release"])
@pytest.mark.parametrize("fault", ["missing", "unexpected", "misshapen", "foreign"])
def test_faults_of_tensors_are_named(release, converted, tmp_path, capsys, to, fault):
    source = tmp_path / "source"
    shutil.copytree(release if to == "hf" else converted, source)
    tensors = weights(source)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    if fault == "missing":
        del tensors[name]
    elif fault == "misshapen":
        tensors[name] = tensors[name][:-1]
    elif fault == "unexpected":
        name = name.replace("layers.1", "layers.7")
        tensors[name] = torch.zeros(2, dtype=torch.bfloat16)
    else:
        name = "optimizer.state"
        tensors[name] = torch.zeros(2, dtype=torch.bfloat16)
    split(tensors, source)
    message = failure(source, tmp_path / "target", to, capsys)
    assert name in message and str(source) in message
    if fault == "misshapen":
        assert "[127, 64], expected [128, 64]" in message and "model-0000" in message


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tensor_that_lacks_or_has_lost_a_row_is_the_one_named(release, tmp_path_factory, capsys, data):
    tensors = weights(release)
    name = data.draw(st.sampled_from(sorted(tensors)))
    fault = data.draw(st.sampled_from(["missing", "misshapen"]))
    if fault == "missing":
        del tensors[name]
    else:
        axis = data.draw(st.integers(0, tensors[name].ndim - 1))
        tensors[name] = tensors[name].narrow(axis, 0, tensors[name].shape[axis] - 1)
    source = tmp_path_factory.mktemp("source")
    shutil.copy(release / "config.json", source)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, source / "model.safetensors")
    message = failure(source, source.parent / "target", "hf", capsys)
    assert f"{name} is missing" in message or f"{name} has shape" in message


def test_a_tensor_in_two_files_is_an_error(release, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(release, source)
    first, second = sorted(source.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second)
    message = failure(source, tmp_path / "target", "hf", capsys)
    assert name in message and first.name in message and second.name in message


def test_a_promise_of_the_index_that_is_not_kept_is_an_error(release, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(release, source)
    index = json.loads((source / INDEX).read_text())
    name = min(index["weight_map"])
    file = source / index["weight_map"][name]
    save_file({key: tensor for key, tensor in load_file(file).items() if key != name}, file)
    message = failure(source, tmp_path / "target", "hf", capsys)
    assert name in message and file.name in message
    file.unlink()
    assert str(file) in failure(source, tmp_path / "target", "hf", capsys)
    index["weight_map"][name] = f"../{file.name}"
    (source / INDEX).write_text(json.dumps(index))
    assert "the name of a file" in failure(source, tmp_path / "target", "hf", capsys)


def test_bad_files_are_named(release, converted, tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    assert "config.json" in failure(converted, tmp_path / "target", "hf", capsys)
    assert "config.json" in failure(release, tmp_path / "target", "release", capsys)
    assert str(source) in failure(source, tmp_path / "target", "hf", capsys)
    whole = (EMBEDDED / "model.safetensors").read_bytes()
    for content in (b"", b"no such format", b"\2\0\0\0\0\0\0\0{}", whole[: len(whole) // 2]):
        (source / "model.safetensors").write_bytes(content)
        assert "model.safetensors" in failure(source, tmp_path / "target", "hf", capsys)
    save_file({"x": torch.zeros(2, dtype=torch.float8_e4m3fn)}, source / "model.safetensors")
    assert "F8_E4M3" in failure(source, tmp_path / "target", "hf", capsys)
    shutil.copy(EMBEDDED / "model.safetensors", source)
    (source / "config.json").write_text("{")
    assert "config.json" in failure(source, tmp_path / "target", "hf", capsys)
    assert "config.json" in failure(source, tmp_path / "target", "release", capsys)


@pytest.mark.parametrize(
    ("to", "key", "value"),
    [("hf", "hidden_size", "wide"), ("hf", "rope_scaling", None), ("release", "image_token_id", "high")],
)
def test_a_bad_setting_is_named(release, converted, tmp_path, capsys, to, key, value):
    source = tmp_path / "source"
    shutil.copytree(release if to == "hf" else converted, source)
    stated = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(stated | {key: value}))
    message = failure(source, tmp_path / "target", to, capsys)
    assert key in message and str(source) in message


@pytest.mark.parametrize("fault", ["missing", "misshapen"])
def test_a_spoilt_sidecar_is_an_error(converted, tmp_path, capsys, fault):
    source = tmp_path / "source"
    shutil.copytree(converted, source)
    kept = load_file(source / UNUSED)
    rows = kept.pop(START_ROWS)
    save_file(kept if fault == "missing" else kept | {START_ROWS: rows[1:].contiguous()}, source / UNUSED)
    message = failure(source, tmp_path / "target", "release", capsys)
    assert START_ROWS in message and UNUSED in message


def test_a_target_with_something_in_it_is_left_alone(release, tmp_path, capsys):
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_text("kept")
    assert "target=" in failure(release, target, "hf", capsys)
    assert [path.name for path in target.iterdir()] == ["mine"]
    (target / "mine").unlink()
    assert run(release, target, "hf") == 0


def test_nothing_is_left_when_writing_fails(release, tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vargpt_rl.convert.save_together", full)
    assert "No space left" in failure(release, tmp_path / "target", "hf", capsys)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden data in {GOLDEN}; VARGPT_GOLDEN names another")
def test_the_golden_weights_convert_both_ways(tmp_path):
    assert run(GOLDEN, tmp_path / "hf", "hf") == 0
    model, report = Vargpt.from_pretrained(tmp_path / "hf", dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    original = load_file(GOLDEN / "weights.safetensors")
    stated = json.loads((GOLDEN / "config.json").read_text())
    blocks_per_chunk = stated["decoder"]["depth"] // stated["decoder"]["block_chunks"]
    assert_same(model.state_dict(), from_release(original, model.config, blocks_per_chunk))
    assert model.config.image_gen_start_token_id == stated["special_ids"]["image_gen_start"]
    assert model.config.text_config.rms_norm_eps == stated["llm"]["rms_norm_eps"]
    assert model.config.image_tokenizer_config.norm_groups == 32
    assert run(tmp_path / "hf", tmp_path / "back", "release") == 0
    assert_same(weights(tmp_path / "back"), original)
    assert (tmp_path / "back/config.json").read_bytes() == (GOLDEN / "config.json").read_bytes()
