"""The whole model: rows and batches that must not influence one another, saving, and gradient checkpointing."""

import pytest
import torch
from PIL import Image

from tests.helpers.tiny import BITS
from vargpt_rl.model.bits import Bits
from vargpt_rl.model.decoder import DecoderBlock, drop_branch
from vargpt_rl.model.likelihood import bit_log_probs, image_log_probs
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.scales import scale_index, scale_slices, schedule_for, token_count
from vargpt_rl.model.unified import Drawing

SIDE = 64
SCHEDULE = schedule_for(SIDE)
TOKENS = token_count(SCHEDULE)
# Another batch shape means another order of additions; logits are a few units large.
SAME = {"rtol": 0.0, "atol": 2e-5}


@pytest.fixture(scope="module")
def bits():
    """Of three images."""
    shape = (3, TOKENS, BITS)
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def images(chat):
    """Two understood images."""
    return chat.vision_inputs([Image.new("RGB", (56, 56), colour) for colour in ("red", "#102030")])


def drawing(bits_NLd: torch.Tensor) -> Drawing:
    return Drawing(Bits().replay(bits_NLd, SCHEDULE).inputs_BLd, (SIDE, SIDE))


@torch.no_grad()
def run(model, chat, rows, bits_NLd=None, images=None, multiple=1):
    ids = chat.pad(rows, "right", multiple=multiple)
    mask = chat.pad([[1] * len(row) for row in rows], "right", value=0, multiple=multiple)
    seen = {} if images is None else images._asdict()
    return model(ids, mask, drawing=None if bits_NLd is None else drawing(bits_NLd), **seen)


def test_saved_and_loaded_models_are_bitwise_equal(model, chat, bits, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = Vargpt.from_pretrained(tmp_path).eval()
    theirs = loaded.state_dict()
    assert theirs.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    assert {**loaded.config.to_dict(), "_name_or_path": ""} == {**model.config.to_dict(), "_name_or_path": ""}
    rows = [chat.drawn("a star", "", TOKENS).ids]
    a, b = (run(m, chat, rows, bits[:1]) for m in (model, loaded))
    assert torch.equal(a.image_logits, b.image_logits)
    assert torch.equal(a.logits, b.logits)


def test_rows_with_several_one_and_no_drawing_are_as_if_alone(model, chat, bits, images):
    grid = images.image_grid_thw[:1]
    several = chat.drawn("a star", "", TOKENS).ids + chat.drawn("two small blue squares", "Here:", TOKENS).ids
    none = chat.answered("What colour is the square?", "red").ids
    one = chat.drawn("a large green triangle", "Here is an image.", TOKENS, grid).ids
    seen = images._replace(pixel_values=images.pixel_values[: int(grid.prod())], image_grid_thw=grid)

    together = run(model, chat, [several, none, one], bits, seen)
    first = run(model, chat, [several], bits[:2])
    text = run(model, chat, [none])
    last = run(model, chat, [one], bits[2:], seen)
    torch.testing.assert_close(together.image_logits[:2], first.image_logits, **SAME)
    torch.testing.assert_close(together.image_logits[2:], last.image_logits, **SAME)
    for b, alone in enumerate((first, text, last)):
        torch.testing.assert_close(together.logits[b, : alone.logits.shape[1]], alone.logits[0], **SAME)

    cut = several[: several.index(model.config.image_gen_end_token_id)]
    torch.testing.assert_close(run(model, chat, [cut], bits[:1]).image_logits, first.image_logits[:1], **SAME)
    other = run(model, chat, [several], bits[[2, 1]]).image_logits
    assert (other[1] - first.image_logits[1]).abs().max() > 1e-3, "a drawing sees the drawings before it in its row"


def test_right_padding_changes_nothing(model, chat, bits):
    row = chat.drawn("a red circle", "Here:", TOKENS).ids
    plain = run(model, chat, [row], bits[:1])
    padded = run(model, chat, [row], bits[:1], multiple=len(row) + 40)
    assert padded.logits.shape[1] == len(row) + 40
    torch.testing.assert_close(padded.image_logits, plain.image_logits, **SAME)
    torch.testing.assert_close(padded.logits[:, : len(row)], plain.logits, **SAME)


def test_left_padding_changes_nothing(model, chat, bits):
    row = chat.drawn("a red circle", "Here:", TOKENS).ids
    plain = run(model, chat, [row], bits[:1])
    ids, mask = (torch.nn.functional.pad(torch.tensor([x]), (7, 0)) for x in (row, [1] * len(row)))
    with torch.no_grad():
        padded = model(ids, mask, drawing=drawing(bits[:1]))
    torch.testing.assert_close(padded.image_logits, plain.image_logits, **SAME)


def test_images_depend_on_their_prompt(model, chat, bits):
    rows = [chat.drawn(text, "", TOKENS).ids for text in ("a red circle", "a blue star")]
    logits = run(model, chat, rows, bits[[0, 0]]).image_logits
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("k", range(len(SCHEDULE)))
def test_logits_of_a_scale_depend_on_coarser_scales_alone(model, chat, bits, k):
    rows = [chat.drawn("a red circle", "", TOKENS).ids]
    changed = bits[:1].clone()
    changed[:, scale_slices(SCHEDULE)[k]] ^= 1
    moved = run(model, chat, rows, changed).image_logits - run(model, chat, rows, bits[:1]).image_logits
    moved_L = moved[0].abs().amax(-1)
    finer_L = scale_index(SCHEDULE) > k
    assert moved_L[~finer_L].max() <= SAME["atol"]
    assert not finer_L.any() or moved_L[finer_L].min() > 1e-4


def test_the_decoders_context_is_what_stands_before_image_gen_start(model, chat, bits):
    rows = [chat.drawn(text, "Here:", TOKENS).ids for text in ("a star", "two small blue squares")]
    contexts = []
    hook = model.image_decoder.register_forward_pre_hook(lambda module, args: contexts.append(args[2]))
    run(model, chat, rows, bits[:2])
    hook.remove()
    starts = [row.index(model.config.image_gen_start_token_id) for row in rows]
    expected = [[True] * start + [False] * (max(starts) - start) for start in starts]
    assert contexts[0].mask_NT.tolist() == expected


def test_a_pass_leaves_no_trace_on_any_module(checkpoint, chat, bits, images):
    model = Vargpt.from_pretrained(checkpoint).eval()

    def traces() -> dict:
        parts = ("_parameters", "_buffers", "_modules")
        return {
            (name, key): (id(value), sorted(value) if key in parts else repr(value)[:200])
            for name, module in model.named_modules()
            for key, value in vars(module).items()
        }

    before = traces()
    seen = images.image_grid_thw
    run(model, chat, [chat.drawn("a star", "", TOKENS, seen).ids], bits[:1], images)
    run(model, chat, [chat.answered("What?", "red", seen).ids], images=images)
    assert traces() == before


def test_dropped_conditions_reach_their_own_image_only(model, chat, bits):
    row = chat.drawn("a red circle", "", TOKENS).ids
    ids = torch.tensor([row, row])
    same = drawing(bits[[0, 0]])
    with torch.no_grad():
        plain = model(ids, drawing=same).image_logits
        dropped = model(ids, drawing=same._replace(unconditional_N=torch.tensor([False, True]))).image_logits
    torch.testing.assert_close(dropped[0], plain[0], **SAME)
    assert (dropped[1] - plain[1]).abs().max() > 1e-3


def test_drop_path_is_off_unless_asked_for_even_in_training(model, chat, bits):
    ids = torch.tensor([chat.drawn("a red circle", "", TOKENS).ids] * 2)
    given = drawing(bits[[0, 0]])
    model.train()
    with torch.no_grad():
        a, b = (model(ids, drawing=given).image_logits for _ in range(2))
        torch.manual_seed(0)
        dropped = model(ids, drawing=given._replace(drop_path=0.5)).image_logits
    model.eval()
    assert torch.equal(a, b)
    assert (dropped - a).abs().max() > 1e-3


def test_drop_path_grows_with_depth_and_drops_whole_branches_of_images(model, chat, bits):
    ids, rates = torch.tensor([chat.drawn("a red circle", "", TOKENS).ids]), []
    blocks = model.image_decoder.blocks
    hooks = [block.register_forward_pre_hook(lambda module, args: rates.append(args[5])) for block in blocks]
    with torch.no_grad():
        model(ids, drawing=drawing(bits[:1])._replace(drop_path=0.3))
    for hook in hooks:
        hook.remove()
    assert rates == [0.3 * i / (len(hooks) - 1) for i in range(len(hooks))]
    torch.manual_seed(0)
    branch_NLC = torch.ones(4000, 2, 3)
    kept_N = drop_branch(branch_NLC, 0.1).flatten(1).unique(dim=1)
    assert kept_N.shape == (4000, 1), "all or nothing"
    assert kept_N.unique().tolist() == [0.0, pytest.approx(1 / 0.9)]
    assert kept_N.mean().item() == pytest.approx(1.0, abs=0.03), "on average as it was, six standard errors"
    assert drop_branch(branch_NLC, 0.0) is branch_NLC


def test_gradient_checkpointing_gives_equal_gradients(checkpoint, chat, bits):
    ids = torch.tensor([chat.drawn("a red circle", "Here:", TOKENS).ids])
    gradients, passes = [], []
    for every in (0, 1, 2):
        model = Vargpt.from_pretrained(checkpoint).train()
        if every:
            model.gradient_checkpointing_enable(every_n_layers=every)
        calls = []
        for module in model.modules():
            if isinstance(module, DecoderBlock):
                module.self_attention.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        output = model(ids, drawing=drawing(bits[:1]))
        (output.image_logits.square().mean() + output.logits.square().mean()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        passes.append(len(calls))
    assert passes == [2, 4, 3], "blocks are run again in the backward pass: none, all, every second"
    plain = gradients[0]
    for recomputed in gradients[1:]:
        assert plain.keys() == recomputed.keys()
        for name, gradient in plain.items():
            # the same operations on the same numbers, give or take the order of accumulation
            torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_text_head_is_left_out_on_request(model, chat, bits):
    ids = torch.tensor([chat.drawn("a star", "", TOKENS).ids])
    with torch.no_grad():
        output = model(ids, drawing=drawing(bits[:1]), text_logits=False)
    assert output.logits is None
    assert output.image_logits.shape == (1, TOKENS, 2 * BITS)


def test_rows_that_do_not_fit_the_drawings_are_refused(model, chat, bits, images):
    with pytest.raises(ValueError, match="1 runs of image_gen_pad with 20 tokens in all, expected 1 images of 21"):
        run(model, chat, [chat.drawn("a star", "", TOKENS - 1).ids], bits[:1])
    with pytest.raises(ValueError, match="1 runs of image_gen_pad with 21 tokens in all, expected 2 images of 21"):
        run(model, chat, [chat.drawn("a star", "", TOKENS).ids], bits[:2])
    with pytest.raises(ValueError, match="0 image_pad tokens, but the images have 8 features"):
        run(model, chat, [chat.drawn("a star", "", TOKENS).ids], bits[:1], images)


def test_bf16_scores_images_as_fp32_does_within_its_precision(checkpoint, model, chat, bits):
    """bf16 has 8 significant bits: a logit of a few units is off by some hundredths, a mean over all bits by less."""
    half = Vargpt.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    row = chat.drawn("a star", "", TOKENS).ids
    ids = chat.pad([row], "right")
    inputs = Bits().replay(bits[:1], SCHEDULE, torch.bfloat16).inputs_BLd
    with torch.no_grad():
        logits = half(ids, torch.ones_like(ids), drawing=Drawing(inputs, (SIDE, SIDE))).image_logits
    assert logits.dtype == torch.bfloat16
    ours = bit_log_probs(logits, bits[:1])
    exact = bit_log_probs(run(model, chat, [row], bits[:1]).image_logits, bits[:1])
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().mean() < 0.03
    assert image_log_probs(ours).dtype == torch.float64
    assert abs((image_log_probs(ours) - image_log_probs(exact)).item()) < 0.01 * ours.numel()
