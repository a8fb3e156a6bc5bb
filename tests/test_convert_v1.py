"""v1's release and model directory, one into the other: nothing is lost. What is common is tested for v1.1."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vargpt_rl.common.command import run_command
from vargpt_rl.convert import UNUSED, Conversion, convert
from vargpt_rl.model.families import load_config, load_model
from vargpt_rl.release.v1_config import to_release_config
from vargpt_rl.release.v1_names import OUR_ROWS, ROWS, dropped_shapes, release_name

GOLDEN = Path(os.environ.get("VARGPT_GOLDEN_V1", Path(__file__).parents[2] / "shared/golden/v1_tiny"))
INDEX = "model.safetensors.index.json"


def run(source: Path, target: Path, to: str) -> int:
    return run_command(Conversion, convert, [f"source={source}", f"target={target}", f"to={to}"])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a directory, by its index if it has one."""
    if not (folder / INDEX).exists():
        return load_file(folder / "model.safetensors")
    files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.fixture(scope="module")
def release(v1_checkpoint, tmp_path_factory):
    """A directory as the release is one: fp16, with values of its own where this model has no place."""
    folder, config = tmp_path_factory.mktemp("release"), load_config(v1_checkpoint)
    tensors = {release_name(name, config): tensor.half() for name, tensor in weights(v1_checkpoint).items()}
    generator = torch.Generator().manual_seed(0)
    last = tensors.pop(ROWS)
    tensors |= {name: torch.randn(shape, generator=generator).half() for name, shape in dropped_shapes(config).items()}
    tensors[ROWS][-2:] = last
    tensors["vargpt_gen.lvl_1L"] = torch.arange(tensors["vargpt_gen.lvl_1L"].numel())[None]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    settings = to_release_config(config, torch.float16) | {"a_key_of_its_own": [1, 2]}
    (folder / "config.json").write_text(json.dumps(settings))
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(v1_checkpoint / name, folder)
    return folder


@pytest.fixture(scope="module")
def converted(release, tmp_path_factory):
    target = tmp_path_factory.mktemp("converted") / "hf"
    assert run(release, target, "hf") == 0
    return target


def test_the_model_is_chosen_by_the_source_and_loads_with_every_key(converted, v1_checkpoint):
    model = load_model(converted, "auto")
    original = load_model(v1_checkpoint, "auto").half()
    assert type(model) is type(original) and model.dtype == torch.float16
    assert_same(model.state_dict(), original.state_dict())
    for name in ("text_config", "vision_config", "decoder_config", "image_tokenizer_config"):
        left, right = getattr(model.config, name).to_dict(), getattr(original.config, name).to_dict()
        assert left | {"dtype": None} == right | {"dtype": None}
    for name in ("image_token_id", "image_gen_start_token_id", "image_gen_end_token_id", "image_gen_pad_token_id"):
        assert getattr(model.config, name) == getattr(original.config, name)


def test_there_and_back_is_the_same(release, converted, tmp_path):
    kept = load_file(converted / UNUSED)
    assert_same(kept, {name: weights(release)[name] for name in kept})
    assert kept.keys() == dropped_shapes(load_config(converted)).keys()
    assert run(converted, tmp_path / "back", "release") == 0
    assert_same(weights(tmp_path / "back"), weights(release))
    assert (tmp_path / "back/config.json").read_bytes() == (release / "config.json").read_bytes()


def test_back_and_there_is_the_same_for_a_model_that_never_was_a_release(v1_checkpoint, tmp_path, capsys):
    assert run(v1_checkpoint, tmp_path / "release", "release") == 0
    assert f"there is no {UNUSED}" in capsys.readouterr().out
    assert run(tmp_path / "release", tmp_path / "hf", "hf") == 0
    assert_same(weights(tmp_path / "hf"), weights(v1_checkpoint))


def test_rows_that_were_trained_are_the_last_ones_of_their_table(converted, release, tmp_path):
    saved = tmp_path / "saved"
    saved.mkdir()
    shutil.copy(converted / UNUSED, saved)
    model = load_model(converted, "auto")
    with torch.no_grad():
        model.get_parameter(OUR_ROWS).add_(1)
    model.save_pretrained(saved)
    assert run(saved, tmp_path / "back", "release") == 0
    rows, before = weights(tmp_path / "back")[ROWS], weights(release)[ROWS]
    assert torch.equal(rows[:-2], before[:-2]) and torch.equal(rows[-2:], before[-2:] + 1)


def test_a_missing_and_a_misshapen_tensor_are_named(release, tmp_path, capsys):
    for fault in ("missing", "misshapen"):
        source, tensors = tmp_path / fault, weights(release)
        shutil.copytree(release, source)
        name = "vae_local.encoder.down.4.attn.0.qkv.weight"
        tensors[name] = tensors[name][:-1].contiguous()
        if fault == "missing":
            del tensors[name]
        save_file(tensors, source / "model.safetensors")
        assert run(source, tmp_path / "target", "hf") == 2
        assert name in capsys.readouterr().err


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden data in {GOLDEN}; VARGPT_GOLDEN_V1 names another")
def test_the_golden_weights_convert_both_ways(tmp_path):
    assert run(GOLDEN, tmp_path / "hf", "hf") == 0
    model, stated = load_model(tmp_path / "hf", "auto"), json.loads((GOLDEN / "config.json").read_text())
    assert model.config.image_gen_start_token_id == stated["special_ids"]["image_gen_start"]
    assert model.config.text_config.rms_norm_eps == stated["llm"]["rms_norm_eps"]
    assert list(model.config.image_tokenizer_config.sides) == stated["var"]["patch_nums"]
    assert run(tmp_path / "hf", tmp_path / "back", "release") == 0
    assert_same(weights(tmp_path / "back"), load_file(GOLDEN / "weights.safetensors"))
    assert (tmp_path / "back/config.json").read_bytes() == (GOLDEN / "config.json").read_bytes()
