"""Operations counted from shapes equal those that torch counts while it runs them."""

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from learners.flops import matrix_peak, shape_of, step_flops
from vargpt_rl.model.scales import token_count
from vargpt_rl.model.unified import replayed
from vargpt_rl.stages import LANGUAGE_INPUTS, STAGES, freeze

SIDE = 64


@pytest.mark.parametrize("stage", [STAGES["dpo"], STAGES["dpo"].without([LANGUAGE_INPUTS]), STAGES["edit"]])
@pytest.mark.parametrize("family", ["", "v1_"])
def test_counts_equal_those_of_a_real_step(family, stage, request):
    model, chat = (request.getfixturevalue(family + name) for name in ("model", "chat"))
    model = copy.deepcopy(model)
    freeze(model, stage)
    schedule = model.config.image_tokenizer_config.schedule_for(SIDE)
    tokens = token_count(schedule)
    ids_BT = chat.pad([chat.drawn(prompt, "", tokens).ids for prompt in ("a star", "a large star")], "right")
    labels = torch.zeros(2, tokens, model.config.image_tokenizer_config.symbols.depth, dtype=torch.uint8)
    text_logits = stage.text_weight > 0
    shape = shape_of(model, ids_BT, schedule, text_logits)
    assert (shape.rows, shape.images, shape.tokens, shape.length) == (2, 2, tokens, ids_BT.shape[1])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(ids_BT, torch.ones_like(ids_BT), replayed(labels, (SIDE, SIDE)), text_logits=text_logits)
        loss = output.image_logits.float().sum()
        (loss + output.logits.float().sum() if text_logits else loss).backward()
    text = model.config.text_config
    trains = model.projector_in.fc1.weight.requires_grad
    # This kernel computes both halves of causal attention.
    masked = 2 * shape.rows * shape.length**2 * text.hidden_size * text.num_hidden_layers * (3 if trains else 1)
    assert step_flops(model, shape) + masked == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_the_peak_is_that_of_a_product(monkeypatch):
    monkeypatch.setattr("learners.flops.PEAK_SIDE", {"cpu": 64})
    before = torch.get_rng_state()
    assert 1e6 < matrix_peak("cpu", torch.float32) < 1e14
    assert torch.equal(torch.get_rng_state(), before)
