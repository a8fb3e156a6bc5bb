"""Damaged and odd model directories: each is refused in one line that names the file or tensor."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.helpers.tiny import SPECIAL_TOKENS, V1_SPECIAL_TOKENS, byte_level_bpe
from vargpt_rl.model.families import load_model
from vargpt_rl.model.hub import check_model
from vargpt_rl.model.whole import INDEX, WEIGHTS, check_values, check_whole


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.fixture
def v1_folder(v1_checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(v1_checkpoint, tmp_path / "v1"))


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        check_whole(folder)
        check_values(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def change_config(folder: Path, path: str, value: object) -> None:
    settings = json.loads((folder / "config.json").read_text())
    *way, last = path.split(".")
    inner = settings
    for key in way:
        inner = inner[key]
    inner[last] = value
    (folder / "config.json").write_text(json.dumps(settings))


def split(folder: Path) -> list[Path]:
    """Split the weights into two shards with an index."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    files = [folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for file, half in zip(files, halves, strict=True):
        save_file({name: tensors[name] for name in half}, file)
    places = {name: file.name for file, half in zip(files, halves, strict=True) for name in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / WEIGHTS).unlink()
    return files


def test_whole_models_of_both_families_pass(folder, v1_folder):
    for each in (folder, v1_folder):
        check_whole(each)
        check_values(each)
    split(folder)
    check_whole(folder)
    check_values(folder)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer"),
        (lambda data: b"", "no whole safetensors file"),
        (lambda data: data[:5], "no whole safetensors file"),
        (lambda data: data[:1000], "no whole safetensors file"),
        (lambda data: data[:-1], "no whole safetensors file"),
        (lambda data: b"\xff" * 8 + data[8:], "no whole safetensors file"),
        (lambda data: b"PK\x03\x04" + data[4:], "no whole safetensors file"),
    ],
)
def test_files_that_hold_no_weights_are_named(folder, shards, damage, said):
    file = split(folder)[1] if shards else folder / WEIGHTS
    file.write_bytes(damage(file.read_bytes()))
    assert refusal(folder).startswith(f"{file}: {said}")


def test_missing_files_are_named(folder):
    files = split(folder)
    files[1].unlink()
    assert refusal(folder) == f"{files[1]}: this shard is missing"
    (folder / INDEX).write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    assert refusal(folder).endswith("shard ../secret.safetensors leaves the model's folder")
    for text in ("", "[]", "{}", '{"weight_map": 7}', '{"weight_map": {"a": 7}}', "[" * 100_000):
        (folder / INDEX).write_text(text)
        assert refusal(folder).startswith(f"{folder / INDEX}: expected an index of shards")
    (folder / INDEX).unlink()
    assert refusal(folder) == f"{folder}: there is neither {WEIGHTS} nor {INDEX}"


def test_tensors_that_do_not_fit_are_named(folder):
    names = sorted(load_file(folder / WEIGHTS))
    for name in (names[0], names[len(names) // 2], names[-1]):
        saved = (folder / WEIGHTS).read_bytes()
        change_weights(folder, lambda tensors, name=name: tensors.pop(name))
        assert refusal(folder) == f"{folder}: 1 tensors are missing, among them {name}"
        (folder / WEIGHTS).write_bytes(saved)
        change_weights(folder, lambda tensors, name=name: tensors.update({name: torch.zeros(3, 5)}))
        assert f"tensor {name} has shape [3, 5], expected [" in refusal(folder)
        (folder / WEIGHTS).write_bytes(saved)
        change_weights(folder, lambda tensors, name=name: tensors.update({f"{name}.more": torch.zeros(1)}))
        assert f"tensor {name}.more is not part of the model" in refusal(folder)
        (folder / WEIGHTS).write_bytes(saved)
        for value in (float("nan"), float("inf")):
            change_weights(folder, lambda tensors, name=name, value=value: tensors[name].view(-1)[-1:].fill_(value))
            assert refusal(folder) == f"{folder / WEIGHTS}: tensor {name} has values that are not finite"
            (folder / WEIGHTS).write_bytes(saved)


@pytest.mark.parametrize("kind", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_tensors_that_are_no_plain_numbers_are_named(folder, kind):
    name = min(load_file(folder / WEIGHTS))
    change_weights(folder, lambda tensors: tensors.update({name: tensors[name].to(kind)}))
    assert f"{folder / WEIGHTS}: tensor {name} is of type " in refusal(folder)


def test_the_weights_that_are_checked_are_those_that_are_loaded(folder):
    """Of a single file and an index beside it, transformers loads the file."""
    whole = (folder / WEIGHTS).read_bytes()
    split(folder)
    (folder / WEIGHTS).write_bytes(whole)
    change_weights(folder, lambda tensors: next(iter(tensors.values())).fill_(float("nan")))
    assert "values that are not finite" in refusal(folder)
    assert any(tensor.isnan().any() for tensor in load_model(folder, "auto").state_dict().values())


def test_a_tensor_named_twice_is_refused(folder):
    data = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip()
    name, told = next((k, v) for k, v in json.loads(header).items() if k != "__metadata__")
    header = header[:-1] + f",{json.dumps(name)}:{json.dumps(told)}}}".encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    assert name in refusal(folder)


SIZES = [
    ("decoder_config.depth", 2_000_000_000, "decoder_config.depth is 2000000000, expected at most 1000"),
    ("text_config.num_hidden_layers", 10**9, "num_hidden_layers is 1000000000, expected at most 1000"),
    ("image_tokenizer_config.blocks_per_level", 10**6, "blocks_per_level is 1000000, expected at most 1000"),
    ("text_config.vocab_size", 10**12, "vocab_size is 1000000000000, expected at most 2147483648"),
    ("text_config.vocab_size", 10**5000, "config.json: "),
    ("decoder_config.width", 2_000_000_000, "config.json: no model can be built of it"),
    ("decoder_config.mlp_ratio", float("inf"), "mlp_ratio is inf, expected at most 2147483648"),
    ("text_config.rope_parameters.rope_theta", float("nan"), "rope_theta is nan, expected at most 2147483648"),
    ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}, "expected weights that are not"),
    ("image_gen_pad_token_id", 70, "image_gen_pad_token_id is 70, which is no special token of its tokenizer"),
    ("image_gen_start_token_id", -1, "image_gen_start_token_id is -1, which is no special token of its tokenizer"),
    ("image_token_id", None, "image_token_id"),
    ("decoder_config.width", -8, ""),
    ("decoder_config.heads", 0, ""),
    ("decoder_config.width", "wide", ""),
    ("decoder_config.depth", None, ""),
    ("decoder_config", [], ""),
    ("text_config", "none", ""),
    ("image_tokenizer_config.channel_multipliers", [1] * 20_000, "channel_multipliers has 20000 items"),
    ("image_tokenizer_config.channel_multipliers", [], ""),
]


@pytest.mark.parametrize(("key", "value", "said"), SIZES, ids=[f"{key}-{n}" for n, (key, _, _) in enumerate(SIZES)])
def test_sizes_that_no_model_has_are_refused_at_once(folder, key, value, said):
    sys.set_int_max_str_digits(0)  # to write what no reader takes
    try:
        change_config(folder, key, value)
    finally:
        sys.set_int_max_str_digits(4300)
    began = time.monotonic()
    assert said in refusal(folder)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("text", ["", "[]", "null", "7", "{", "[" * 100_000, '{"model_type": ["vargpt"]}'])
def test_configurations_of_other_types_are_one_line(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match="^checkpoint=") as error:
        check_model(str(folder))
    assert "\n" not in str(error.value)


def test_more_words_than_embeddings_are_refused_with_both_numbers(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    tokenizer.add_tokens([f"<extra{number}>" for number in range(rows)])
    tokenizer.save_pretrained(folder)
    assert refusal(folder) == (
        f"{folder}: the tokenizer has {len(tokenizer)} tokens, but the model has embeddings of {rows}"
    )
    (folder / "tokenizer.json").write_text("{}")
    assert refusal(folder).startswith(f"{folder}: its tokenizer cannot be loaded: ")


def test_a_tokenizer_without_the_tokens_of_images_is_refused(folder, v1_folder):
    """As that of a model which this one began from, copied into its folder."""
    for each, tokens in ((folder, SPECIAL_TOKENS[:3]), (v1_folder, V1_SPECIAL_TOKENS[:3])):
        named = {"eos_token": tokens[2], "bos_token": tokens[1], "pad_token": tokens[0]}
        plain = PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe(tokens), **named)
        plain.save_pretrained(each)
        assert "which is no special token of its tokenizer" in refusal(each)


@pytest.mark.parametrize("token", ["bos_token", "eos_token"])
def test_a_tokenizer_that_lacks_a_token_of_the_template_is_refused(v1_folder, token):
    path = v1_folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {token: None}))
    assert refusal(v1_folder).startswith(f"{v1_folder}: its tokenizer gives token None, expected 0 to ")
