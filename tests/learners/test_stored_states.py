"""A policy that is given the language model's states scores as one that computes them, without a language model."""

import copy

import pytest
import torch

from learners.flops import shape_of, step_flops
from learners.image_policy import POLICIES, ScoredOutput
from vargpt_rl.model.scales import token_count
from vargpt_rl.stages import LANGUAGE_INPUTS, STAGES, freeze

SIDE = 64


@pytest.mark.parametrize("family", ["", "v1_"])
@pytest.mark.parametrize("scales", [None, 2])
def test_given_states_are_as_good_as_the_language_model(family, scales, request):
    original, chat = (request.getfixturevalue(family + name) for name in ("model", "chat"))
    model = POLICIES[type(original)](copy.deepcopy(original.config)).train()
    model.load_state_dict(original.state_dict())
    trained = freeze(model, STAGES["dpo"].without([LANGUAGE_INPUTS]))
    schedule = model.image_tokenizer.schedule_for(SIDE)[:scales]
    tokens = token_count(schedule)
    ids_BT = chat.pad([chat.drawn(prompt, "", tokens).ids for prompt in ("a star", "a large star")], "right")
    symbols = model.config.image_tokenizer_config.symbols
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(symbols.values, (2, tokens, symbols.depth), generator=generator, dtype=torch.int32)
    labels = labels.to(torch.uint8) if symbols.values == 2 else labels
    given = ids_BT, torch.ones_like(ids_BT), labels, torch.tensor(SIDE)

    def gradients(**kwargs) -> tuple[ScoredOutput, dict[str, torch.Tensor | None]]:
        model.zero_grad()
        found = model(*given, scales=scales, **kwargs)
        found.log_probs_BK.sum().backward()
        return found, {name: parameter.grad for name, parameter in model.named_parameters() if name in trained}

    scored, expected = gradients()
    shape = shape_of(model, ids_BT, schedule)
    whole = step_flops(model, shape)
    model.drop_language_model()
    assert not model.has_language_model and 0 < step_flops(model, shape) < whole
    again, found = gradients(states=scored.states)
    assert torch.equal(again.log_probs_BK, scored.log_probs_BK)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items() if gradient is not None)
