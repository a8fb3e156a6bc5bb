"""Credit by scale against numbers worked out by hand."""

import pytest
import torch

from vargpt_rl.losses.credit import scale_credit, summed_tokens, token_credit, weighted_sum
from vargpt_rl.model.likelihood import scale_sums
from vargpt_rl.model.scales import schedule_for, token_count

SCHEDULE = ((1, 1), (2, 2), (4, 4))


def test_alpha_0_weighs_every_token_by_exactly_1():
    for schedule in (SCHEDULE, schedule_for(256), schedule_for(512)):
        assert scale_credit(schedule, 0.0).tolist() == [1.0] * len(schedule)
        assert token_credit(schedule, 0.0).tolist() == [1.0] * token_count(schedule)


def test_weights_fall_with_the_area_and_have_mean_1():
    # alpha 0.5: 1, 1/2, 1/4 for 1, 4 and 16 tokens, which sum to 1 + 2 + 4 = 7 over 21 tokens
    assert scale_credit(SCHEDULE, 0.5).tolist() == pytest.approx([3.0, 1.5, 0.75])
    # alpha 1: each scale has the same total, 21 / 3
    assert (scale_credit(SCHEDULE, 1.0) * torch.tensor([1, 4, 16])).tolist() == pytest.approx([7.0, 7.0, 7.0])
    weights_L = token_credit(SCHEDULE, 0.5)
    assert weights_L.mean().item() == pytest.approx(1.0)
    assert weights_L.tolist() == pytest.approx([3.0] + [1.5] * 4 + [0.75] * 16)


def test_scales_beyond_the_prefix_have_weight_0():
    assert scale_credit(SCHEDULE, 0.0, 2).tolist() == [1.0, 1.0, 0.0]
    # 1 and 1/2 for 1 and 4 tokens: 3 over 5 tokens
    assert scale_credit(SCHEDULE, 0.5, 2).tolist() == pytest.approx([5 / 3, 5 / 6, 0.0])
    assert token_count(schedule_for(256)[:5]) == 121


@pytest.mark.parametrize(
    ("alpha", "scales", "message"),
    [
        (-0.1, None, "credit_alpha=-0.1"),
        (0.0, 0, "credit_scales=0"),
        (0.0, 4, "credit_scales=4: expected null or 1 to 3"),
    ],
)
def test_impossible_credit_is_refused(alpha, scales, message):
    with pytest.raises(ValueError, match=message):
        scale_credit(SCHEDULE, alpha, scales)


def test_sums_by_scale_weigh_as_tokens_do():
    values_NLd = torch.randn(3, 21, 4, generator=torch.Generator().manual_seed(0))
    by_scale = scale_sums(values_NLd, SCHEDULE)
    expected = (values_NLd.double().sum(-1) * token_credit(SCHEDULE, 0.6)).sum(1)
    torch.testing.assert_close(weighted_sum(by_scale, scale_credit(SCHEDULE, 0.6)), expected)
    torch.testing.assert_close(
        weighted_sum(by_scale[:, :2], scale_credit(SCHEDULE, 0.6, 2)),
        weighted_sum(by_scale, scale_credit(SCHEDULE, 0.6, 2)),
    )


def test_gradients_scale_with_the_credit_of_each_scale():
    logits = torch.zeros(1, 21, requires_grad=True, dtype=torch.float64)

    def gradient(alpha: float, scales: int | None) -> torch.Tensor:
        loss = (torch.nn.functional.logsigmoid(logits) * token_credit(SCHEDULE, alpha, scales)).sum()
        return torch.autograd.grad(loss, logits)[0]

    ratio = gradient(0.6, 2) / gradient(0.0, None)
    torch.testing.assert_close(ratio[0], token_credit(SCHEDULE, 0.6, 2))


def test_a_weighted_sum_varies_as_one_of_more_tokens():
    schedule = schedule_for(64)
    assert summed_tokens(schedule, scale_credit(schedule, 0.0)) == token_count(schedule)
    credit_L = token_credit(schedule, 0.6)
    assert summed_tokens(schedule, scale_credit(schedule, 0.6)) == pytest.approx((credit_L**2).sum().item())
    first = scale_credit(schedule, 0.0, 2)
    assert summed_tokens(schedule, first) == token_count(schedule[:2])
