"""Names and shapes of the released checkpoint against a model of its size, on the meta device."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

from vargpt_rl.model.configuration import VargptConfig
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.release import DROPPED, from_release, our_name

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
    language = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    config = VargptConfig(
        text_config=language | {"num_key_value_heads": 4, "vocab_size": 152064},
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
        "optimizer.state",
    ],
)
def test_unknown_tensors_are_errors(name):
    with pytest.raises(KeyError, match=name):
        our_name(name, **SIZES)


def test_every_reason_to_drop_a_tensor_is_used(released):
    for pattern in DROPPED:
        assert any(re.match(pattern, name) for name in released), pattern
