"""Parameters that each stage trains."""

import copy

import pytest
import torch

from tests.helpers.tiny import tiny_config, tiny_tokenizer
from vargpt_rl.losses.supervised import Noise
from vargpt_rl.model.adapter import AdapterConfig, attach, is_adapter
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.scales import token_count
from vargpt_rl.model.unified import replayed
from vargpt_rl.stages import NO_NOISE, STAGES, UNREACHED, Learns, Stage, freeze, frozen_parts

IMAGE = ("image_decoder.", "projector_in.", "projector_out.")
LANGUAGE = ("lm_head.", "model.language_model.")


@pytest.fixture(scope="module")
def model():
    return Vargpt(tiny_config(tiny_tokenizer()))


@pytest.mark.parametrize(
    ("stage", "trained"),
    [
        ("base", (*IMAGE, *LANGUAGE, "model.visual.")),
        ("pretrain", ("projector_in.", "projector_out.")),
        ("understanding", (*LANGUAGE, "model.visual.merger.")),
        ("sft", IMAGE),
        ("sft_on_winners", IMAGE),
        ("dpo", IMAGE),
        ("edit", (*IMAGE, *LANGUAGE, "model.visual.")),
    ],
)
def test_each_stage_trains_its_own_parts_and_freezes_the_rest(model, stage, trained):
    names = freeze(model, STAGES[stage])
    assert names == sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    expected = {name for name, _ in model.named_parameters() if name.startswith(trained)} - {UNREACHED}
    assert names == sorted(expected)
    assert all(any(name.startswith(part) for name in names) for part in trained)


def test_only_its_own_stage_trains_the_image_tokenizer(model):
    for stage in STAGES.values():
        if stage.learns is not Learns.IMAGES:
            assert not any(name.startswith("image_tokenizer.") for name in freeze(model, stage))


def test_editing_trains_all_that_a_loss_can_reach(model):
    freeze(model, STAGES["edit"])
    assert frozen_parts(model) == [UNREACHED, "image_tokenizer"]
    assert STAGES["edit"].text_weight > 0 and STAGES["edit"].noise != NO_NOISE


def test_a_stage_trains_its_own_part_of_an_adapter():
    adapter = AdapterConfig("lora", targets=["language_model", "self_attention.qkv"], full=["projectors"])
    attach(adapted := Vargpt(tiny_config(tiny_tokenizer())), adapter)
    names = freeze(adapted, STAGES["sft"], adapter)
    assert {name.split(".")[0] for name in names} == {"image_decoder", "projector_in", "projector_out"}
    assert all(is_adapter(name) and ".self_attention.qkv." in name for name in names if name.startswith("image"))
    assert not any(map(is_adapter, filter(lambda name: name.startswith("projector"), names)))
    assert names == sorted(name for name, parameter in adapted.named_parameters() if parameter.requires_grad)
    assert all(name.startswith("model.language_model") for name in freeze(adapted, STAGES["understanding"], adapter))
    only = AdapterConfig("lora", targets=["language_model"], full=["vision_tower"])
    attach(adapted := Vargpt(tiny_config(tiny_tokenizer())), only)
    with pytest.raises(ValueError, match="nothing of stage sft, expected some of .*image_decoder"):
        freeze(adapted, STAGES["sft"], only)


def test_frozen_parts_are_named_as_a_whole(model):
    freeze(model, STAGES["understanding"])
    expected = ["image_decoder", "image_tokenizer", "model.visual.blocks", "model.visual.patch_embed"]
    assert frozen_parts(model) == [*expected, "projector_in", "projector_out"]


def test_parts_of_a_stage_can_be_frozen_too(model):
    names = freeze(model, STAGES["sft"].without(["projector_in", "projector_out"]))
    assert names and all(name.startswith("image_decoder.") for name in names)
    assert STAGES["sft"].without([]) == STAGES["sft"]
    with pytest.raises(ValueError, match=r"\['lm_head'\] cannot be frozen in stage sft: expected .*projector_in"):
        STAGES["sft"].without(["lm_head"])
    with pytest.raises(ValueError, match="leaves nothing to train in stage pretrain"):
        STAGES["pretrain"].without(["projector_in", "projector_out"])


@pytest.mark.parametrize("family", ["", "v1_"])
def test_frozen_language_inputs_need_no_graph_in_the_language_model(family, request):
    model = copy.deepcopy(request.getfixturevalue(f"{family}model"))
    chat = request.getfixturevalue(f"{family}chat")
    size = (64, 64)
    schedule = model.image_tokenizer.schedule_for(*size)
    depth = model.config.image_tokenizer_config.symbols.depth
    labels = torch.zeros(1, token_count(schedule), depth, dtype=torch.uint8)
    ids = torch.tensor([chat.drawn("a star", "", token_count(schedule)).ids])
    states = []
    model.model.language_model.register_forward_hook(lambda *_, **__: states.append(_[-1].last_hidden_state))
    model.train().gradient_checkpointing_enable()  # transformers would ask for a gradient of the embeddings
    for parts in ([], ["language_inputs"]):
        trained = freeze(model, STAGES["dpo"].without(parts))
        model(ids, drawing=replayed(labels, size), text_logits=False).image_logits.sum().backward()
        with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert with_gradient <= set(trained)
        model.zero_grad()
    assert [state.requires_grad for state in states] == [True, False]
    assert any(name.startswith("image_decoder.blocks.") for name in trained)
    with pytest.raises(ValueError, match="leaves nothing"):
        STAGES["dpo"].without(["language_inputs", "projector_out", "image_decoder"])
    with pytest.raises(ValueError, match="cannot be frozen in stage edit"):
        STAGES["edit"].without(["language_inputs"])


def test_freezing_again_lets_go_of_what_was_frozen(model):
    freeze(model, STAGES["pretrain"])
    before = freeze(model, STAGES["understanding"])
    freeze(model, STAGES["pretrain"])
    assert freeze(model, STAGES["understanding"]) == before


def test_stages_are_found_by_their_names_and_preferences_meet_no_noise():
    assert all(name == stage.name for name, stage in STAGES.items())
    none = Noise(flip=0.0, condition_drop=0.0, drop_path=0.0)
    assert STAGES["dpo"].noise == STAGES["sft_on_winners"].noise == none, "and neither does the control"
    assert STAGES["sft"].noise == Noise(flip=0.3, condition_drop=0.1, drop_path=0.1), "the release's"
    assert {name for name, stage in STAGES.items() if stage.noise.drop_path} == {"sft", "edit"}
    assert STAGES["understanding"].text_weight > 0


def test_a_prefix_without_parameters_is_an_error_and_changes_nothing():
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="stage odd: no parameter's name starts with 'nobody.'"):
        freeze(layer, Stage(name="odd", trains=("weight", "nobody."), learns=Learns.PAIRS))
    assert all(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_trains_the_same_parts_as_in_the_other_family(v1_model, stage):
    names = freeze(v1_model, STAGES[stage])
    image = ("image_decoder.", "projector_in.", "projector_out.")
    language = ("lm_head.", "model.language_model.")
    every = (*image, *language, "model.vision_tower.", "model.multi_modal_projector.")
    parts = {
        "base": every,
        "edit": every,
        "pretrain": image[1:],
        "tokenizer": ("image_tokenizer.",),
        "understanding": (*language, "model.multi_modal_projector."),
    }.get(stage, image)
    unreached = ("model.vision_tower.post_layernorm.", "model.vision_tower.encoder.layers.1.")
    found = (name for name, _ in v1_model.named_parameters() if name.startswith(parts))
    assert names == sorted(name for name in found if not name.startswith(unreached))


def test_a_part_can_be_frozen_by_its_name_in_either_family():
    stage = STAGES["understanding"]
    assert stage.without(["model.multi_modal_projector"]) == stage.without(["model.visual.merger"])
