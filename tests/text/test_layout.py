import pytest

from vargpt_rl.text.layout import check_set, is_text

LAYER = "model.language_model.layers.0"
MODEL = {
    f"{LAYER}.self_attn.q_proj.weight": (8, 8),
    f"{LAYER}.self_attn.q_proj.bias": (8,),
    f"{LAYER}.self_attn.k_proj.weight": (4, 8),
    f"{LAYER}.self_attn.k_proj.bias": (4,),
    f"{LAYER}.self_attn.o_proj.weight": (8, 8),
    f"{LAYER}.mlp.gate_proj.weight": (16, 8),
    f"{LAYER}.mlp.up_proj.weight": (16, 8),
    "model.visual.merger.mlp.0.weight": (8, 8),
    "model.visual.merger.mlp.0.bias": (8,),
    "lm_head.weight": (32, 8),
}


def part(*fragments: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in MODEL.items() if any(fragment in name for fragment in fragments)}


def test_the_language_half_is_told_from_what_draws(model):
    text = {name for name in model.state_dict() if is_text(name)}
    assert text == {name for name in model.state_dict() if not name.startswith(("projector_", "image_"))}
    assert {name.split(".")[1] for name in text} == {"language_model", "visual", "weight"}


@pytest.mark.parametrize("fragments", [(".",), ("q_proj", "k_proj"), ("o_proj",), ("mlp.gate", "mlp.up"), ("lm_head",)])
def test_sets_of_whole_layers_fit(fragments):
    check_set(part(*fragments), MODEL)


@pytest.mark.parametrize(
    ("fragments", "missing"),
    [
        (("q_proj",), "self_attn.k_proj.bias"),
        (("q_proj", "k_proj.weight"), "self_attn.k_proj.bias"),
        (("up_proj",), "mlp.gate_proj.weight"),
        (("merger.mlp.0.weight",), "merger.mlp.0.bias"),
    ],
)
def test_a_layer_in_part_is_refused_by_the_name_of_what_is_missing(fragments, missing):
    with pytest.raises(ValueError, match=f"{missing} is missing: the set has other tensors of layer"):
        check_set(part(*fragments), MODEL)


def test_unknown_and_misshapen_tensors_are_refused():
    with pytest.raises(ValueError, match="image_decoder.head.weight: the model has no such tensor"):
        check_set({"image_decoder.head.weight": (1,)}, MODEL)
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(32, 9\), expected \(32, 8\)"):
        check_set({"lm_head.weight": (32, 9)}, MODEL)
