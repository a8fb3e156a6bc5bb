"""Log-probabilities of bits against plain softmaxes."""

import pytest
import torch

from vargpt_rl.model.likelihood import (
    ROUNDING,
    bit_entropy,
    bit_hits,
    bit_log_probs,
    image_log_probs,
    log_prob_tolerance,
    scale_means,
    scale_sums,
    symbol_entropy,
    symbol_hits,
    symbol_log_probs,
)
from vargpt_rl.model.multiscale import Symbols
from vargpt_rl.model.scales import scale_slices, schedule_for, token_count

SCHEDULE = schedule_for(64)
DEPTH = 8


@pytest.fixture
def logits():
    shape = (3, token_count(SCHEDULE), 2 * DEPTH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 4


@pytest.fixture
def bits(logits):
    shape = (*logits.shape[:2], DEPTH)
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_a_bits_log_probability_is_its_two_way_softmax(logits, bits):
    explicit = logits.unflatten(-1, (DEPTH, 2)).log_softmax(-1)
    explicit = explicit.gather(-1, bits.long()[..., None])[..., 0]
    # fp32: two ways of writing the same function, at values up to about 20
    torch.testing.assert_close(bit_log_probs(logits, bits), explicit, rtol=1e-5, atol=1e-6)


def test_entropy_is_that_of_the_two_way_softmax(logits):
    log_p = logits.unflatten(-1, (DEPTH, 2)).double().log_softmax(-1)
    torch.testing.assert_close(bit_entropy(logits).double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-4, atol=1e-6)


def test_certain_bits_have_finite_log_probabilities_and_no_entropy():
    logits = torch.tensor([[[-500.0, 500.0]]])
    assert bit_log_probs(logits, torch.tensor([[[1]]])).item() == 0
    assert bit_log_probs(logits, torch.tensor([[[0]]])).item() == -1000
    assert bit_entropy(logits).item() == 0


def test_hits_are_where_the_likelier_value_is_the_bit():
    logits = torch.tensor([[[0.0, 1.0, 0.0, 1.0, 1.0, 0.0]]])
    assert bit_hits(logits, torch.tensor([[[1, 0, 0]]])).tolist() == [[[True, False, True]]]


def test_low_precision_logits_are_reduced_in_fp32(logits, bits):
    log_probs = bit_log_probs(logits.bfloat16(), bits)
    assert log_probs.dtype == torch.float32
    assert torch.equal(log_probs, bit_log_probs(logits.bfloat16().float(), bits))


def test_sums_are_exact_where_fp32_is_not():
    # 2^24 + 1 is the first whole number fp32 cannot hold.
    values = torch.cat([torch.full((1, 1, 1), -(2.0**24)), torch.full((1, 20, 1), -1.0)], dim=1)
    total = image_log_probs(values)
    assert total.dtype == torch.float64
    assert total.tolist() == [-(2.0**24) - 20]
    assert scale_sums(values, SCHEDULE).sum().item() == total.item()


def test_scale_sums_add_up_and_scale_means_are_means(logits, bits):
    log_probs = bit_log_probs(logits, bits)
    sums = scale_sums(log_probs, SCHEDULE)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums.sum(1), image_log_probs(log_probs), rtol=1e-12, atol=0)
    counts = torch.tensor([(at.stop - at.start) * DEPTH for at in scale_slices(SCHEDULE)])
    torch.testing.assert_close(scale_means(log_probs, SCHEDULE).double(), sums / counts, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("depth", "values"), [(1, 5), (3, 4), (4, 2)])
def test_symbols_of_any_number_of_values_are_softmaxes_over_them(depth, values):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, depth * values, generator=generator) * 4
    labels = torch.randint(0, values, (2, 7, depth), generator=generator)
    log_p = logits.unflatten(-1, (depth, values)).double().log_softmax(-1)
    assert Symbols.of(logits, labels) == (depth, values)
    explicit = log_p.gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(symbol_log_probs(logits, labels).double(), explicit, rtol=1e-5, atol=1e-6)
    entropy = symbol_entropy(logits, Symbols(depth, values)).double()
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1), rtol=1e-4, atol=1e-6)
    assert torch.equal(symbol_hits(logits, labels), log_p.argmax(-1) == labels)
    assert symbol_log_probs(logits.bfloat16(), labels).dtype == torch.float32


def test_tolerance_grows_with_the_root_of_the_bits():
    for dtype, of_one in ROUNDING.items():
        assert log_prob_tolerance(dtype, 1) == of_one
        assert log_prob_tolerance(dtype, 400) == pytest.approx(20 * of_one)
    # Of 16,672 bits at 256 px: what an H200 differed by from fp32 passes, another prompt's 100 nats do not.
    assert 1.3 < log_prob_tolerance(torch.bfloat16, 16_672) < 10
