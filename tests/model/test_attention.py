"""Attention without dense masks: equal to attention with them, and in a flash kernel on GPUs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.helpers.tiny import BITS
from vargpt_rl.model.decoder import attend_by_scale
from vargpt_rl.model.scales import scale_index, scale_slices, scales_within, schedule_for, token_count
from vargpt_rl.model.unified import replayed

SIDE = 64
SCHEDULE = schedule_for(SIDE)
TOKENS = token_count(SCHEDULE)


def rows(chat, prompts: list[str], tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and mask of rows with an image each."""
    ids = [chat.drawn(prompt, "", tokens).ids for prompt in prompts]
    mask = [[1] * len(row) for row in ids]
    return chat.pad(ids, "right", multiple=64), chat.pad(mask, "right", value=0, multiple=64)


def test_attention_by_scale_equals_a_block_causal_mask():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, TOKENS, 16, generator=generator)
    scale_L = scale_index(SCHEDULE)
    masked = F.scaled_dot_product_attention(q, k, v, attn_mask=scale_L[:, None] >= scale_L, scale=1.0)
    masked = masked.transpose(1, 2).flatten(2)
    torch.testing.assert_close(attend_by_scale(q, k, v, scale_slices(SCHEDULE)), masked)
    last = scale_slices(SCHEDULE)[-1]
    one = attend_by_scale(q[:, :, last], k, v, scales_within(SCHEDULE, last))
    torch.testing.assert_close(one, masked[:, last])


@pytest.mark.parametrize("family", ["", "v1_"])
def test_right_padded_rows_are_scored_without_a_mask(family, request, monkeypatch):
    model, chat = (request.getfixturevalue(family + name) for name in ("model", "chat"))
    schedule = model.config.image_tokenizer_config.schedule_for(SIDE)
    tokens = token_count(schedule)
    attention, masks = F.scaled_dot_product_attention, []

    def watched(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return attention(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    labels = torch.zeros(2, tokens, model.config.image_tokenizer_config.symbols.depth, dtype=torch.uint8)
    ids, mask = rows(chat, ["a star", "a star"], tokens)
    with torch.no_grad():
        model(ids, mask, replayed(labels, (SIDE, SIDE)))
        model(*rows(chat, ["a star", "a large green triangle"], tokens), replayed(labels, (SIDE, SIDE)))
    assert not mask.all()
    assert [mask.shape[1:3] for mask in masks if mask is not None] in ([], [(1, 1)] * len(model.image_decoder.blocks))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_runs_in_a_flash_kernel(model, chat):
    fast = copy.deepcopy(model).to("cuda", torch.bfloat16)
    ids, mask = rows(chat, ["a star", "a star"])
    labels = torch.zeros(2, TOKENS, BITS, dtype=torch.uint8, device="cuda")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an attention that no flash kernel can do raises RuntimeError
        output = fast(ids.cuda(), mask.cuda(), replayed(labels, (SIDE, SIDE)), text_logits=False)
        output.image_logits.float().sum().backward()
