"""Policy-gradient losses against numbers worked out by hand."""

import math

import pytest
import torch

from vargpt_rl.losses.policy_gradient import (
    clipped_policy_loss,
    group_advantages,
    kl_k3,
    likelihood_loss,
    middle_return,
    part_advantages,
    preference_loss,
)


def test_advantages_are_centred_and_divided_by_the_groups_spread():
    # mean 0.25, standard deviation sqrt(3) / 4
    assert group_advantages([1.0, 0.0, 0.0, 0.0]) == pytest.approx([math.sqrt(3), *[-1 / math.sqrt(3)] * 3])
    assert group_advantages([1.0, 0.0, 0.0, 0.0], normalise=False) == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert group_advantages([2.0, None, 4.0]) == [-1.0, None, 1.0]


@pytest.mark.parametrize("rewards", [[1.0, 1.0, 1.0], [0.0, 1e-9], [0.5], [None, None], [None, 2.0], []])
def test_groups_without_a_difference_have_no_advantages(rewards):
    assert group_advantages(rewards) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rewards_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="expected finite numbers"):
        group_advantages([0.0, bad])


def test_at_ratio_1_the_gradient_is_the_policy_gradient():
    log_prob = torch.tensor([-0.3, -0.6], requires_grad=True)
    advantage = torch.tensor([1.0, -2.0])
    loss, metrics = clipped_policy_loss(log_prob, log_prob.detach(), advantage, 0.2)
    assert loss.tolist() == [-1.0, 2.0]
    assert metrics["ratio"].tolist() == [1.0, 1.0] and metrics["clipped"].tolist() == [0.0, 0.0]
    (clipped,) = torch.autograd.grad(loss.sum(), log_prob)
    (plain,) = torch.autograd.grad(likelihood_loss(log_prob, advantage).sum(), log_prob)
    assert clipped.tolist() == plain.tolist() == [-1.0, 2.0]


def test_ratios_outside_the_range_are_clipped_where_it_would_pay():
    # ratios 1.5 and 0.5, with either sign of the advantage
    log_prob = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, metrics = clipped_policy_loss(log_prob, torch.zeros(4), advantage, 0.2)
    assert loss.tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8])
    assert metrics["clipped"].tolist() == [1.0, 0.0, 0.0, 1.0]
    (gradient,) = torch.autograd.grad(loss.sum(), log_prob)
    assert gradient.tolist() == pytest.approx([0.0, 1.5, -0.5, 0.0])


def test_kl_is_0_for_the_reference_and_positive_elsewhere():
    log_prob = torch.tensor([-0.5, -0.5, -0.5], requires_grad=True)
    reference = torch.tensor([-0.5, -0.5 + math.log(2), -0.5 - math.log(2)])
    kl = kl_k3(log_prob, reference)
    assert kl.tolist() == pytest.approx([0.0, 1 - math.log(2), math.log(2) - 0.5])
    (gradient,) = torch.autograd.grad(kl.sum(), log_prob)
    assert gradient.tolist() == pytest.approx([0.0, -1.0, 0.5], abs=1e-6)


def test_the_middle_return_lies_between_mean_and_maximum():
    assert middle_return([0.0, 1.0], 1.0) == pytest.approx(math.log((1 + math.e) / 2))
    assert middle_return([0.0, 1.0], 1e4) == pytest.approx(0.5, abs=1e-4)
    assert middle_return([0.0, 1.0], 1e-4) == pytest.approx(1.0, abs=1e-3)
    assert middle_return([800.0, 800.0], 1.0) == 800.0


def test_prefixes_are_judged_by_their_completions():
    # values ln((1 + e) / 2) and 0; the group's standard deviation is sqrt(3) / 4
    value = math.log((1 + math.e) / 2)
    found = part_advantages([1.0, 0.0, 0.0, 0.0], completions=2, eta=1.0)
    spread = math.sqrt(3) / 4
    expected = [(1.0, (1 - value) / spread), (1.0, -value / spread), (-1.0, 0.0), (-1.0, 0.0)]
    assert [pytest.approx(each) for each in expected] == found
    plain = part_advantages([1.0, 0.0, 0.0, 0.0], completions=2, eta=1.0, normalise=False)
    assert plain[0] == pytest.approx((value / 2, 1 - value))


def test_prefixes_of_equal_value_leave_the_signal_to_the_rest():
    value = math.log((1 + math.e) / 2)
    found = part_advantages([1.0, 0.0, 0.0, 1.0], completions=2, eta=1.0)
    assert [coarse for coarse, _ in found] == [0.0] * 4
    assert [rest for _, rest in found] == pytest.approx([2 * (1 - value), -2 * value, -2 * value, 2 * (1 - value)])


def test_unscored_completions_are_left_out():
    assert part_advantages([1.0, 1.0, 1.0, None], completions=2, eta=1.0) is None
    found = part_advantages([1.0, None, 0.0, None, None, None], completions=2, eta=1.0)
    assert found == [(1.0, 0.0), None, (-1.0, 0.0), None, None, None]


def test_pairs_are_of_one_group_and_of_different_reward():
    ratio = torch.tensor([1.0, 0.0, 0.0, 5.0], requires_grad=True)
    reward = torch.tensor([1.0, 0.0, math.nan, 9.0])
    loss, metrics = preference_loss(ratio, reward, torch.tensor([0, 0, 0, 1]), beta=0.5)
    assert loss.mean().item() == pytest.approx(0.75 * math.log(1 + math.exp(-0.5))), "3 of 4 images are in that group"
    assert metrics["margin"].tolist() == [1.5, 0.0, 0.0, 0.0] and metrics["accuracy"].tolist() == [3.0, 0.0, 0.0, 0.0]
    loss.sum().backward()
    assert ratio.grad[0] == -ratio.grad[1] < 0 and ratio.grad[2:].tolist() == [0.0, 0.0]


def test_all_pairs_of_a_group_weigh_as_much_as_one():
    ratio = torch.zeros(4)
    reward = torch.tensor([2.0, 1.0, 1.0, 0.0])  # 5 pairs
    loss, metrics = preference_loss(ratio, reward, torch.zeros(4), beta=0.1)
    assert loss.mean().item() == pytest.approx(math.log(2)) and metrics["margin"].sum() == 0
