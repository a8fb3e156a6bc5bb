"""Names and shapes of the released checkpoint against a model of its size, on the meta device."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vargpt_rl.model.configuration import RELEASE_LANGUAGE, VargptConfig
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.release.v1_1_config import from_release_config, to_release_config
from vargpt_rl.release.v1_1_names import (
    DROPPED,
    START_ROWS,
    dropped_shapes,
    from_release,
    our_name,
    release_name,
    start_rows_shape,
)

GOLDEN = Path(os.environ.get("VARGPT_GOLDEN", Path(__file__).parents[3] / "shared/golden/v1_1_tiny"))
KEYS = GOLDEN.parent / "full_release_keys.json"
SIZES = {"levels": 5, "blocks_per_level": 2, "blocks_per_chunk": 4}


@pytest.fixture(scope="module")
def released():
    """Name -> shape of every tensor of the released model."""
    if not KEYS.is_file():
        pytest.skip(f"no list of released tensors at {KEYS}")
    return {name: tuple(shape) for name, shape in json.loads(KEYS.read_text())["keys"].items()}


@pytest.fixture(scope="module")
def model():
    """The release's language and vision sizes are Qwen2-VL-7B's; the rest is the configuration's default."""
    config = VargptConfig(
        text_config=RELEASE_LANGUAGE | {"vocab_size": 152064},
        vision_config={"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 3584},
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return Vargpt(config)


def test_every_released_tensor_has_a_place_of_its_shape_or_a_reason_to_be_dropped(released, model):
    assert len(released) == 1706
    tensors = {name: torch.empty(shape, device="meta") for name, shape in released.items()}
    renamed = from_release(tensors, model.config, SIZES["blocks_per_chunk"])
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in renamed.items()} == expected
    dropped = [name for name in released if our_name(name, **SIZES) is None]
    assert len(renamed) == len(released) - len(dropped), "no two tensors share a name"


def test_every_tensor_of_the_model_has_a_released_name_and_with_the_dropped_ones_they_are_all(released, model):
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    back = {release_name(name, **SIZES): shape for name, shape in shapes.items()}
    back |= dropped_shapes(model.config, SIZES["blocks_per_chunk"]) | {START_ROWS: start_rows_shape(model.config)}
    assert back == released
    for name in released:
        ours = our_name(name, **SIZES)
        assert ours is None or release_name(ours, **SIZES) == name


def test_the_sizes_are_read_off_the_shapes(released, model):
    stated = to_release_config(model.config, torch.bfloat16)
    del stated["decoder_config"], stated["image_tokenizer_config"]
    config, blocks_per_chunk = from_release_config(stated, released, torch.bfloat16)
    assert blocks_per_chunk == SIZES["blocks_per_chunk"]
    for part in ("text_config", "vision_config", "decoder_config", "image_tokenizer_config"):
        ours, theirs = getattr(config, part).to_dict(), getattr(model.config, part).to_dict()
        assert {key: value for key, value in ours.items() if theirs[key] != value and key != "dtype"} == {}
    assert config.dtype == torch.bfloat16


def test_a_published_config_of_the_old_form_is_understood(released):
    """As the reference's preparation wrote it: keys of unknown use, the scaling called mrope, few values."""
    stated = {
        "model_type": "vargpt_qwen2_vl",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "vision_config": {"in_chans": 3, "spatial_patch_size": 14, "depth": 32},
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }
    config, _ = from_release_config(stated, released, torch.bfloat16)
    assert config.text_config.rope_parameters == RELEASE_LANGUAGE["rope_parameters"]
    assert config.image_gen_start_token_id == 151657
    assert "in_chans" not in config.vision_config.to_dict()


@given(
    levels=st.integers(1, 12),
    blocks=st.integers(1, 12),
    per_chunk=st.integers(1, 12),
    name=st.sampled_from(
        [
            "image_tokenizer.{half}.levels.{level}.{block}.norm2.weight",
            "image_tokenizer.{half}.levels.{level}.{block}.shortcut.bias",
            "image_tokenizer.{half}.levels.{level}.{sampler}.conv.weight",
            "image_tokenizer.{half}.middle.1.conv1.bias",
            "image_tokenizer.{half}.conv_in.weight",
            "image_tokenizer.{half}.norm_out.bias",
            "image_decoder.blocks.{index}.self_attention.log_scale",
            "image_decoder.blocks.{index}.cross_attention.kv.weight",
            "image_decoder.blocks.{index}.modulation_offset",
        ]
    ),
    data=st.data(),
)
def test_the_two_ways_are_inverse_at_any_size(levels, blocks, per_chunk, name, data):
    half = data.draw(st.sampled_from(["encoder", "decoder"]))
    last = blocks + (half == "decoder")
    ours = name.format(
        half=half,
        level=data.draw(st.integers(0, levels - 1)),
        block=data.draw(st.integers(0, last - 1)),
        sampler=last,
        index=data.draw(st.integers(0, 99)),
    )
    sizes = (levels, blocks, per_chunk)
    assert our_name(release_name(ours, *sizes), *sizes) == ours


def test_only_the_row_of_image_gen_start_is_kept(model):
    rows = torch.arange(12.0).view(4, 3)
    ((name, kept),) = from_release({"sos_embedding.weight": rows}, model.config, 4).items()
    assert name == "image_decoder.condition.start_embedding"
    assert torch.equal(kept, rows[-1])


def test_blocks_are_counted_through_the_chunks():
    name = "vargpt_gen.block_chunks.2.module.1.sa.mat_qkv.weight"
    assert our_name(name, **SIZES) == "image_decoder.blocks.9.self_attention.qkv.weight"


@pytest.mark.parametrize(
    "name",
    [
        "vargpt_gen.block_chunks.0.module.0.novelty.weight",
        "image_gen_projector.mlp.1.weight",
        "vargpt_gen.pos_1LC",
        "vargpt_gen.block_chunks.0.module.0.sa.qkv.weight",
        "vae_local.encoder.conv_in.weight",
        "optimizer.state",
    ],
)
def test_unknown_tensors_are_errors(name):
    with pytest.raises(KeyError, match=name):
        our_name(name, **SIZES)


def test_unknown_tensors_of_a_model_are_errors():
    for name in ("image_decoder.novelty", "image_decoder.blocks.0.novelty"):
        with pytest.raises(KeyError, match=name):
            release_name(name, **SIZES)


def test_every_reason_to_drop_a_tensor_is_used(released):
    for pattern in DROPPED:
        assert any(re.match(pattern, name) for name in released), pattern
