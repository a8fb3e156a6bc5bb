"""The moving average of trained tensors: its rule, in the place of the weights, and through a training checkpoint."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from learners.average import AverageWeights


def model_of(value: float, dtype: torch.dtype = torch.float32) -> nn.Linear:
    model = nn.Linear(3, 2).to(dtype)
    nn.init.constant_(model.weight, value)
    return model


def move(average: AverageWeights, model: nn.Linear, step: int, value: float) -> None:
    nn.init.constant_(model.weight, value)
    average.on_step_end(None, SimpleNamespace(global_step=step), None)


def test_the_average_follows_its_rule_and_leaves_the_weights():
    model = model_of(1.0)
    average = AverageWeights(model, ["weight"], 0.5)
    expected = 1.0
    for step, value in ((1, 2.0), (2, 5.0), (40, 7.0)):
        move(average, model, step, value)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    bias = model.bias.clone()
    with average.in_force():
        assert not torch.is_grad_enabled()
        torch.testing.assert_close(model.weight.detach(), torch.full((2, 3), expected))
        assert torch.equal(model.bias, bias)
    assert torch.equal(model.weight.detach(), torch.full((2, 3), 7.0)) and model.weight.requires_grad


def test_the_average_of_half_precision_is_kept_in_fp32():
    model = model_of(1.0, torch.bfloat16)
    average = AverageWeights(model, ["weight"], 0.999)
    for step in range(1000, 1100):
        move(average, model, step, 2.0)
    with average.in_force():  # steps of 1e-3 would be lost in bf16
        assert model.weight.dtype == torch.bfloat16
        assert model.weight.mean().item() == pytest.approx(2 - 0.991**100, abs=0.3) and model.weight[0, 0] > 1.05


def test_a_checkpoint_restores_the_average_bitwise(tmp_path):
    model = model_of(0.1)
    average = AverageWeights(model, ["weight"], 0.9)
    move(average, model, 1, 0.3)
    average.save(tmp_path)
    again = AverageWeights(model_of(5.0), ["weight"], 0.9)
    again.load(tmp_path)
    with average.in_force():
        first = model.weight.detach().clone()
    other = next(iter(again._parameters.values()))
    with again.in_force():
        assert torch.equal(other.detach(), first)
