"""Names and shapes of v1's released checkpoint against a model of its size, on the meta device."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

from vargpt_rl.model.v1.configuration import VargptV1Config
from vargpt_rl.model.v1.modeling import VargptV1
from vargpt_rl.release.v1_config import from_release_config, to_release_config
from vargpt_rl.release.v1_names import DROPPED, OUR_ROWS, ROWS, dropped_shapes, neutral, reason_dropped, release_name

GOLDEN = Path(os.environ.get("VARGPT_GOLDEN_V1", Path(__file__).parents[3] / "shared/golden/v1_tiny"))
KEYS = GOLDEN.parent / "full_release_keys_v1.json"


@pytest.fixture(scope="module")
def released():
    """Name -> shape of every tensor of the released model."""
    if not KEYS.is_file():
        pytest.skip(f"no list of released tensors at {KEYS}")
    return {name: tuple(shape) for name, shape in json.loads(KEYS.read_text())["keys"].items()}


@pytest.fixture(scope="module")
def model():
    """The configuration's defaults are the release's sizes."""
    with torch.device("meta"):
        return VargptV1(VargptV1Config())


def test_every_released_tensor_has_a_place_of_its_shape_or_a_reason_to_be_dropped(released, model):
    assert len(released) == 1424
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    placed = {release_name(name, model.config): shape for name, shape in ours.items()}
    assert len(placed) == len(ours), "no two tensors share a name"
    assert placed.pop(ROWS) == (2, released[ROWS][1])
    dropped = dropped_shapes(model.config)
    assert placed.keys().isdisjoint(dropped)
    assert placed | dropped == released
    for name in released:
        assert (reason_dropped(name) is not None) == (name in dropped), name


def test_the_sizes_are_read_off_the_shapes(released, model):
    stated = to_release_config(model.config, torch.bfloat16)
    del stated["decoder_config"], stated["image_tokenizer_config"]
    config = from_release_config(stated, released, torch.bfloat16)
    for part in ("text_config", "vision_config", "decoder_config", "image_tokenizer_config"):
        ours, theirs = getattr(config, part).to_dict(), getattr(model.config, part).to_dict()
        different = {key for key, value in ours.items() if value != theirs[key] and key != "dtype"}
        assert {key for key in different if list(ours[key]) != list(theirs[key])} == set(), part
    assert config.dtype == torch.bfloat16
    assert config.image_gen_start_token_id == 32002 and config.image_token_id == 32000


def test_a_published_config_of_the_old_form_is_understood(released):
    """LLaVA-1.5's own states only what differs from transformers' defaults."""
    stated = {
        "model_type": "vargpt_llava",
        "image_token_index": 32000,
        "pad_token_id": 32001,
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
    }
    config = from_release_config(stated, released, torch.float16)
    assert config.text_config.num_hidden_layers == 32 and config.text_config.pad_token_id == 32001
    assert config.text_config.rope_parameters["rope_theta"] == 1e4
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in VargptV1(config).state_dict().items()}
    assert shapes[OUR_ROWS] == (2, 1920)
    scaled = stated | {"text_config": stated["text_config"] | {"rope_scaling": {"type": "linear", "factor": 2.0}}}
    with pytest.raises(ValueError, match=r"text_config.rope_scaling is .*linear.*, expected none"):
        from_release_config(scaled, released, torch.float16)


def test_unknown_tensors_of_a_model_are_errors(model):
    for name in ("image_decoder.novelty", "image_decoder.blocks.0.novelty", "novelty"):
        with pytest.raises(KeyError, match=name):
            release_name(name, model.config)


def test_every_reason_to_drop_a_tensor_is_used(released):
    for pattern in DROPPED:
        assert any(re.fullmatch(pattern, name) for name in released), pattern


def test_made_up_buffers_are_the_references():
    config = VargptV1Config(image_tokenizer_config={"sides": [1, 2]}, decoder_config={"width": 4, "depth": 1})
    shapes = dropped_shapes(config)

    def made(name: str) -> torch.Tensor:
        return neutral(name, shapes[name], torch.float32, config)

    assert made("vargpt_gen.lvl_1L").tolist() == [[0, 1, 1, 1, 1]]
    bias_LL = made("vargpt_gen.attn_bias_for_masking")[0, 0]
    assert bias_LL[0].tolist() == [0] + [-torch.inf] * 4 and not bias_LL[1:].any()
    assert made("image_gen_projector.ln_q.weight").tolist() == [1.0] * 4
    assert not made("image_gen_projector.ln_q.bias").any() and not made(ROWS).any()
