"""The v1 model: rows and batches that must not influence one another, conditions, saving, gradient checkpointing."""

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from tests.helpers.tiny import V1_CODES, V1_SIDES
from vargpt_rl.model.families import load_model
from vargpt_rl.model.scales import scale_index, scale_slices, token_count
from vargpt_rl.model.unified import Drawing, replayed
from vargpt_rl.model.v1.decoder import V1DecoderBlock

SIZE = (16 * V1_SIDES[-1],) * 2
# Another batch shape means another order of additions; logits are a few units large.
SAME = {"rtol": 0.0, "atol": 2e-5}


@pytest.fixture(scope="module")
def schedule(v1_model):
    return v1_model.image_tokenizer.schedule_for(*SIZE)


@pytest.fixture(scope="module")
def labels(schedule):
    """Of three images."""
    shape = (3, token_count(schedule), 1)
    return torch.randint(0, V1_CODES, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int32)


@pytest.fixture(scope="module")
def images(v1_chat):
    """Two understood images."""
    return v1_chat.vision_inputs([Image.new("RGB", (56, 40), colour) for colour in ("red", "#102030")])


@torch.no_grad()
def run(model, chat, rows, labels_NLs=None, images=None, multiple=1, side="right"):
    ids = chat.pad(rows, side, multiple=multiple)
    mask = chat.pad([[1] * len(row) for row in rows], side, value=0, multiple=multiple)
    seen = {} if images is None else images._asdict()
    return model(ids, mask, drawing=None if labels_NLs is None else replayed(labels_NLs, SIZE), **seen)


def test_saved_and_loaded_models_are_bitwise_equal(v1_model, v1_chat, labels, tmp_path):
    v1_model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(v1_model.state_dict()), "under our names"
    loaded = load_model(tmp_path, "auto").eval()
    assert type(loaded) is type(v1_model)
    theirs = loaded.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in v1_model.state_dict().items())
    assert {**loaded.config.to_dict(), "_name_or_path": ""} == {**v1_model.config.to_dict(), "_name_or_path": ""}
    rows = [v1_chat.drawn("a star", "", labels.shape[1]).ids]
    a, b = (run(m, v1_chat, rows, labels[:1]) for m in (v1_model, loaded))
    assert torch.equal(a.image_logits, b.image_logits)


def test_rows_with_several_one_and_no_drawing_are_as_if_alone(v1_model, v1_chat, labels, images):
    chat, tokens, grid = v1_chat, labels.shape[1], images.image_grid_thw[:1]
    several = chat.drawn("a star", "", tokens).ids + chat.drawn("two small blue squares", "Here:", tokens).ids
    none = chat.answered("What colour is the square?", "red").ids
    one = chat.drawn("a large green triangle", "Here is an image.", tokens, grid).ids
    seen = images._replace(pixel_values=images.pixel_values[:1], image_grid_thw=grid)

    together = run(v1_model, chat, [several, none, one], labels, seen)
    first = run(v1_model, chat, [several], labels[:2])
    text = run(v1_model, chat, [none])
    last = run(v1_model, chat, [one], labels[2:], seen)
    torch.testing.assert_close(together.image_logits[:2], first.image_logits, **SAME)
    torch.testing.assert_close(together.image_logits[2:], last.image_logits, **SAME)
    for b, alone in enumerate((first, text, last)):
        torch.testing.assert_close(together.logits[b, : alone.logits.shape[1]], alone.logits[0], **SAME)
    other = seen._replace(pixel_values=images.pixel_values[1:])
    moved = run(v1_model, chat, [one], labels[2:], other).image_logits - last.image_logits
    assert moved.abs().max() > 1e-3, "a drawing sees the images that are shown before it"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(v1_model, v1_chat, labels, side):
    row = v1_chat.drawn("a red circle", "Here:", labels.shape[1]).ids
    plain = run(v1_model, v1_chat, [row], labels[:1])
    padded = run(v1_model, v1_chat, [row], labels[:1], multiple=len(row) + 7, side=side)
    torch.testing.assert_close(padded.image_logits, plain.image_logits, **SAME)


def test_images_depend_on_their_prompt(v1_model, v1_chat, labels):
    rows = [v1_chat.drawn(text, "", labels.shape[1]).ids for text in ("a red circle", "a blue star")]
    logits = run(v1_model, v1_chat, rows, labels[[0, 0]]).image_logits
    assert logits.shape == (2, labels.shape[1], V1_CODES)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("k", range(len(V1_SIDES)))
def test_logits_of_a_scale_depend_on_coarser_scales_alone(v1_model, v1_chat, schedule, labels, k):
    rows = [v1_chat.drawn("a red circle", "", labels.shape[1]).ids]
    changed = labels[:1].clone()
    at = scale_slices(schedule)[k]
    changed[:, at] = (changed[:, at] + 1) % V1_CODES
    moved = run(v1_model, v1_chat, rows, changed).image_logits - run(v1_model, v1_chat, rows, labels[:1]).image_logits
    moved_L = moved[0].abs().amax(-1)
    finer_L = scale_index(schedule) > k
    assert moved_L[~finer_L].max() <= SAME["atol"]
    assert not finer_L.any() or moved_L[finer_L].min() > 1e-4


def test_conditions_reach_their_own_image_only_and_none_means_what_drawing_uses(v1_model, v1_chat, labels):
    row = v1_chat.drawn("a red circle", "", labels.shape[1]).ids
    ids = torch.tensor([row, row])
    with torch.no_grad():
        given = replayed(labels[[0, 0]], SIZE)(v1_model)
        both = {
            name: v1_model(ids, drawing=given._replace(unconditional_N=mask)).image_logits
            for name, mask in {
                "trained": torch.tensor([False, False]),
                "second": torch.tensor([False, True]),
                "drawn": None,
            }.items()
        }
    torch.testing.assert_close(both["second"][0], both["trained"][0], **SAME)
    assert (both["second"][1] - both["trained"][1]).abs().max() > 1e-3
    torch.testing.assert_close(both["drawn"][1], both["second"][1], **SAME)


def test_drop_path_is_off_unless_asked_for_and_grows_with_depth(v1_model, v1_chat, labels, monkeypatch):
    ids = torch.tensor([v1_chat.drawn("a red circle", "", labels.shape[1]).ids])
    with torch.no_grad():
        given = replayed(labels[:1], SIZE)(v1_model)
    rates, blocks = [], v1_model.image_decoder.blocks
    hooks = [block.register_forward_pre_hook(lambda module, args: rates.append(args[3])) for block in blocks]
    v1_model.train()
    with torch.no_grad():
        a, b = (v1_model(ids, drawing=given).image_logits for _ in range(2))
        v1_model(ids, drawing=given._replace(drop_path=0.3))
    v1_model.eval()
    for hook in hooks:
        hook.remove()
    assert torch.equal(a, b)
    assert rates[:4] == [0.0] * 4
    assert rates[4:] == [0.0, pytest.approx(0.3 * 2 / 24)]


def test_gradient_checkpointing_gives_equal_gradients(v1_checkpoint, v1_chat, labels):
    ids = torch.tensor([v1_chat.drawn("a red circle", "Here:", labels.shape[1]).ids])
    gradients, passes = [], []
    for checkpointed in (False, True):
        model = load_model(v1_checkpoint, "auto").train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        calls = []
        for module in model.modules():
            if isinstance(module, V1DecoderBlock):
                module.self_attention.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        output = model(ids, drawing=replayed(labels[:1], SIZE))
        (output.image_logits.square().mean() + output.logits.square().mean()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        passes.append(len(calls))
    assert passes[1] == 2 * passes[0], "blocks are run again in the backward pass"
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_rows_that_do_not_fit_are_refused(v1_model, v1_chat, labels, images):
    tokens = labels.shape[1]
    with pytest.raises(ValueError, match=f"1 runs of image_gen_pad with {tokens - 1} tokens in all"):
        run(v1_model, v1_chat, [v1_chat.drawn("a star", "", tokens - 1).ids], labels[:1])
    with pytest.raises(ValueError, match="0 image_pad tokens, but the images have 8 features"):
        run(v1_model, v1_chat, [v1_chat.drawn("a star", "", tokens).ids], labels[:1], images)
    with pytest.raises(ValueError, match="this model draws 64x64 pixels only"):
        v1_model(torch.tensor([[1]]), drawing=Drawing(torch.zeros(1, 3, 8), (32, 32)))
