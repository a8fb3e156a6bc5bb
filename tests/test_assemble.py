"""The starting point from its three parts, on tiny files of their layouts."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.helpers import tiny
from vargpt_rl.assemble import Assembly, assemble
from vargpt_rl.common.command import run_command
from vargpt_rl.convert import Conversion, convert
from vargpt_rl.model.configuration import VargptConfig
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.prompt import ChatFormat
from vargpt_rl.release.v1_1_config import NEW_TOKENS, sizes_of
from vargpt_rl.release.v1_1_names import dropped_shapes, release_name

BITS, WIDTH, HIDDEN, DEPTH, CHUNK = 8, 64, 32, 4, 2
ROWS = 400


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A directory as Qwen2-VL is published: names ``visual.*`` and ``model.*``, no tokens for drawn images."""
    folder = tmp_path_factory.mktemp("qwen2vl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "SPECIAL_TOKENS", tiny.SPECIAL_TOKENS[:-3])
        tokenizer = tiny.tiny_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": ROWS,
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": end,
        },
        vision_config={"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": HIDDEN, "mlp_ratio": 2},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    torch.manual_seed(1)
    Qwen2VLForConditionalGeneration(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(size={"shortest_edge": 56**2, "longest_edge": 56**2}).save_pretrained(folder)
    assert {name.split(".")[0] for name in load_file(folder / "model.safetensors")} == {"visual", "model", "lm_head"}
    return folder


@pytest.fixture(scope="module")
def parts():
    """State dicts of the decoder and the image tokenizer, under the names of their own files."""
    config = VargptConfig(
        text_config={"hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8},
        vision_config={"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": HIDDEN},
        decoder_config={"width": WIDTH, "depth": DEPTH, "heads": 2},
        image_tokenizer_config={
            "bits": BITS,
            "base_channels": 32,
            "channel_multipliers": (1, 2, 2),
            "blocks_per_level": 1,
        },
    )
    torch.manual_seed(2)
    sizes = sizes_of(config, CHUNK)
    tensors = {release_name(name, *sizes): tensor for name, tensor in Vargpt(config).state_dict().items()}
    tensors |= {name: torch.zeros(shape) for name, shape in dropped_shapes(config, CHUNK).items()}
    return {
        prefix: {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        for prefix in ("vargpt_gen.", "vae_local.")
    }


def nested(state: dict, *keys: str) -> dict:
    for key in reversed(keys):
        state = {key: state, "epoch": 3}
    return state


def unchunked(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    def index(match: re.Match) -> str:
        return f"{prefix}.{int(match[1]) * CHUNK + int(match[2])}."

    return {re.sub(r"block_chunks\.(\d+)\.module\.(\d+)\.", index, name): value for name, value in state.items()}


def unwrapped(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {re.sub(r"\.(conv|norm)\.(weight|bias)$", r".\2", name): value for name, value in state.items()}


def run(folder: Path, language: Path, decoder: dict, image_tokenizer: dict, target="target", seed: int = 0) -> int:
    torch.save(decoder, folder / "decoder.pth")
    torch.save(image_tokenizer, folder / "image_tokenizer.pth")
    arguments = {
        "language": language,
        "decoder": folder / "decoder.pth",
        "image_tokenizer": folder / "image_tokenizer.pth",
        "target": folder / target,
        "seed": seed,
    }
    return run_command(Assembly, assemble, [f"{key}={value}" for key, value in arguments.items()])


@pytest.fixture(scope="module")
def assembled(language, parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("assembled")
    assert run(folder, language, parts["vargpt_gen."], nested(parts["vae_local."], "vae")) == 0
    return folder / "target"


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    model, report = Vargpt.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model.state_dict()


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_every_part_is_in_its_place(assembled, language, parts):
    state = state_of(assembled)
    original = Qwen2VLForConditionalGeneration.from_pretrained(language, dtype=torch.float32).state_dict()
    assert_same({name: state[name] for name in original}, original)
    config = VargptConfig.from_pretrained(assembled)
    assert config.dtype == torch.bfloat16
    assert config.decoder_config.depth == DEPTH and config.image_tokenizer_config.channel_multipliers == [1, 2, 2]
    sizes = sizes_of(config, CHUNK)
    for name, tensor in state.items():
        prefix, _, rest = release_name(name, *sizes).partition(".")
        if prefix in ("vargpt_gen", "vae_local"):
            assert torch.equal(tensor, parts[f"{prefix}."][rest]), name


def test_the_types_of_the_parts_are_kept(assembled):
    (path,) = assembled.glob("*.safetensors")
    tensors = load_file(path)
    assert tensors["lm_head.weight"].dtype == tensors["projector_in.fc1.weight"].dtype == torch.bfloat16
    assert tensors["image_decoder.head.weight"].dtype == torch.float32


def test_projectors_and_start_row_are_drawn_from_the_seed(assembled, language, parts, tmp_path):
    state = state_of(assembled)
    for name in ("projector_in.fc1", "projector_in.fc2", "projector_out.fc1", "projector_out.fc2"):
        assert 0.017 < state[f"{name}.weight"].std() < 0.023 and not state[f"{name}.bias"].any()
    start = "image_decoder.condition.start_embedding"
    assert 0.01 < state[start].std() < 0.03
    for seed, same in ((0, True), (1, False)):
        assert run(tmp_path, language, parts["vargpt_gen."], parts["vae_local."], f"seed{seed}", seed) == 0
        again = state_of(tmp_path / f"seed{seed}")
        assert torch.equal(again["projector_in.fc1.weight"], state["projector_in.fc1.weight"]) == same
        assert torch.equal(again[start], state[start]) == same


def test_the_tokenizer_and_the_configuration_know_the_new_tokens(assembled, language):
    before = AutoTokenizer.from_pretrained(language)
    chat = ChatFormat(str(assembled), VargptConfig.from_pretrained(assembled))
    ids = [chat.tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in NEW_TOKENS]
    assert ids == [len(before), len(before) + 1, len(before) + 2]
    assert ids == [getattr(chat.config, f"{name}_token_id") for name in NEW_TOKENS]
    assert chat.tokenizer(f"<|{NEW_TOKENS[2]}|>", add_special_tokens=False).input_ids == ids[2:]
    assert ids[2] not in chat.text(f"<|{NEW_TOKENS[2]}|>")
    assert chat.config.text_config.pad_token_id == before.pad_token_id
    assert set(before.all_special_tokens) < set(chat.tokenizer.all_special_tokens)
    assert chat.drawing_prompt("a red circle", "Here it is.")[-1] == ids[0]


@pytest.mark.parametrize(
    ("decoder", "image_tokenizer"),
    [
        (lambda state: unchunked(state, "blocks"), lambda state: state),
        (lambda state: unchunked(state, "unregistered_blocks"), lambda state: nested(state, "state_dict")),
        (lambda state: nested(state, "trainer", "gpt_fsdp"), lambda state: nested(state, "trainer", "vae_local")),
        (lambda state: state, lambda state: nested(unwrapped(state), "vae")),
    ],
)
def test_other_layouts_of_the_files_give_the_same_model(assembled, language, parts, tmp_path, decoder, image_tokenizer):
    assert run(tmp_path, language, decoder(parts["vargpt_gen."]), image_tokenizer(parts["vae_local."])) == 0
    assert_same(state_of(tmp_path / "target"), state_of(assembled))


def test_the_names_of_later_transformers_give_the_same_model(assembled, language, parts, tmp_path):
    renamed = tmp_path / "language"
    renamed.mkdir()
    for path in language.iterdir():
        (renamed / path.name).write_bytes(path.read_bytes())
    prefixes = {"visual": "model.visual", "model": "model.language_model", "lm_head": "lm_head"}
    tensors = {
        ".".join([prefixes[name.split(".")[0]], *name.split(".")[1:]]): tensor
        for name, tensor in load_file(language / "model.safetensors").items()
    }
    assert "model.visual.merger.ln_q.weight" in tensors and "model.language_model.norm.weight" in tensors
    save_file(tensors, renamed / "model.safetensors", {"format": "pt"})
    assert run(tmp_path, renamed, parts["vargpt_gen."], parts["vae_local."]) == 0
    assert_same(state_of(tmp_path / "target"), state_of(assembled))


def test_a_flat_configuration_as_qwen2_vl_was_published_with_is_understood(assembled, language, parts, tmp_path):
    folder = tmp_path / "language"
    folder.mkdir()
    for path in language.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    nested_settings = json.loads((language / "config.json").read_text())
    flat = {**nested_settings.pop("text_config"), **nested_settings, "torch_dtype": "bfloat16", "rope_theta": 1e6}
    del flat["rope_parameters"], flat["layer_types"], flat["dtype"]
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 3, 3]}
    flat["vision_config"] |= {"in_chans": 3, "spatial_patch_size": 14}
    (folder / "config.json").write_text(json.dumps(flat))
    assert run(tmp_path, folder, parts["vargpt_gen."], parts["vae_local."]) == 0
    ours, theirs = map(VargptConfig.from_pretrained, (tmp_path / "target", assembled))
    assert ours.text_config.to_dict() == theirs.text_config.to_dict()
    assert ours.vision_config.to_dict() == theirs.vision_config.to_dict()
    assert_same(state_of(tmp_path / "target"), state_of(assembled))


def test_the_starting_point_converts_to_a_release(assembled, tmp_path):
    arguments = [f"source={assembled}", f"target={tmp_path / 'release'}", "to=release"]
    assert run_command(Conversion, convert, arguments) == 0


def failure(capsys, *args) -> str:
    folder = args[0]
    assert run(*args) == 2
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".pth" and path != args[1]) == []
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


def test_faults_of_tensors_are_named(language, parts, tmp_path, capsys):
    decoder, image_tokenizer = parts["vargpt_gen."], parts["vae_local."]
    without = {name: tensor for name, tensor in decoder.items() if name != "pos_start"}
    message = failure(capsys, tmp_path, language, without, image_tokenizer)
    assert "pos_start is missing" in message and "decoder.pth" in message
    wide = decoder | {"cfg_uncond": torch.zeros(512, 2 * WIDTH)}
    message = failure(capsys, tmp_path, language, wide, image_tokenizer)
    assert "cfg_uncond has shape [512, 128], expected [512, 64]" in message and "decoder.pth" in message
    more = image_tokenizer | {"encoder.novelty": torch.zeros(1)}
    message = failure(capsys, tmp_path, language, decoder, more)
    assert "encoder.novelty is unexpected" in message and "image_tokenizer.pth" in message
    name = "block_chunks.1.module.1.sa.v_bias"
    both = unchunked(decoder, "blocks") | {"block_chunks.0.module.3.sa.v_bias": decoder[name]}
    message = failure(capsys, tmp_path, language, both, image_tokenizer)
    assert "blocks.3.sa.v_bias" in message and "block_chunks.0.module.3.sa.v_bias" in message
    assert "decoder.pth" in failure(capsys, tmp_path, language, image_tokenizer, image_tokenizer)
    assert "image_tokenizer.pth" in failure(capsys, tmp_path, language, decoder, {"optimizer": 1})


class Evil:
    """An object in a file of tensors."""

    def __reduce__(self):
        return (Path.touch, (Path("made-by-a-pickle"),))


def test_objects_are_never_read(language, parts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "decoder.pth" in failure(capsys, tmp_path, language, parts["vargpt_gen."] | {"x": Evil()}, {})


def test_files_that_are_no_tensors_are_named(language, parts, tmp_path, capsys):
    path = tmp_path / "bad.pth"
    arguments = [f"language={language}", f"decoder={path}", f"image_tokenizer={path}", f"target={tmp_path / 't'}"]
    for content in (None, b"", b"text"):
        if content is not None:
            path.write_bytes(content)
        assert run_command(Assembly, assemble, arguments) == 2
        assert str(path) in capsys.readouterr().err
    torch.save(parts["vargpt_gen."], path, _use_new_zipfile_serialization=False)
    assert run_command(Assembly, assemble, arguments) == 2
    assert str(path) in capsys.readouterr().err


def test_an_embedding_without_room_for_the_new_tokens_is_an_error(language, parts, tmp_path, capsys):
    small = tmp_path / "language"
    small.mkdir()
    for path in language.iterdir():
        (small / path.name).write_bytes(path.read_bytes())
    stated = json.loads((language / "config.json").read_text())
    stated["text_config"]["vocab_size"] = len(AutoTokenizer.from_pretrained(language)) + 2
    (small / "config.json").write_text(json.dumps(stated))
    message = failure(capsys, tmp_path, small, parts["vargpt_gen."], parts["vae_local."])
    assert "embed_tokens" in message and str(small) in message


def test_a_language_directory_must_be_qwen2_vl_with_a_tokenizer(assembled, language, parts, tmp_path, capsys):
    assert "config.json" in failure(capsys, tmp_path, assembled, parts["vargpt_gen."], parts["vae_local."])
    bare = tmp_path / "language"
    bare.mkdir()
    (bare / "config.json").write_bytes((language / "config.json").read_bytes())
    assert str(bare) in failure(capsys, tmp_path, bare, parts["vargpt_gen."], parts["vae_local."])
