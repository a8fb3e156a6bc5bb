"""A pass over the coarse scales alone: the same logits as in the whole pass, since no scale depends on finer ones."""

import pytest
import torch

from vargpt_rl.model.scales import token_count
from vargpt_rl.model.unified import replayed


@pytest.fixture(params=["v1.1", "v1"])
def family(request):
    """Model, chat template and image side in pixels."""
    names = ("model", "chat", 64) if request.param == "v1.1" else ("v1_model", "v1_chat", 64)
    return request.getfixturevalue(names[0]), request.getfixturevalue(names[1]), names[2]


def test_coarse_scales_alone_have_the_logits_of_the_whole_pass(family):
    model, chat, side = family
    schedule = model.image_tokenizer.schedule_for(side)
    depth, values = model.config.image_tokenizer_config.symbols
    labels = torch.randint(0, values, (2, token_count(schedule), depth), generator=torch.Generator().manual_seed(0))

    def logits(scales: int | None) -> torch.Tensor:
        tokens = token_count(schedule[:scales])
        ids = chat.pad([chat.drawn(text, "Here:", tokens).ids for text in ("a star", "two red circles")], "right")
        drawing = replayed(labels[:, :tokens], (side, side), scales)
        with torch.no_grad():
            return model(ids, torch.ones_like(ids), drawing=drawing, text_logits=False).image_logits

    whole = logits(None)
    for scales in range(1, len(schedule)):
        coarse = logits(scales)
        assert coarse.shape[1] == token_count(schedule[:scales]) < whole.shape[1]
        torch.testing.assert_close(coarse, whole[:, : coarse.shape[1]], rtol=0, atol=1e-5)


def test_labels_must_be_those_of_the_coarse_scales(family):
    model, _, side = family
    tokenizer = model.image_tokenizer
    labels = torch.zeros(1, 5, model.config.image_tokenizer_config.symbols.depth, dtype=torch.int64)
    tokenizer.replay(labels, tokenizer.schedule_for(side), scales=2)
    with pytest.raises(ValueError, match="5 image tokens, but the schedule .* has 1$"):
        tokenizer.replay(labels, tokenizer.schedule_for(side), scales=1)
