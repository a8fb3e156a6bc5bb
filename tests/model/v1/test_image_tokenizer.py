"""The codebook: nearest entries, replay, and that scales see coarser scales only."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.tiny import V1_CODES, V1_SIDES
from vargpt_rl.model.families import load_model
from vargpt_rl.model.scales import scale_index, scale_slices, token_count
from vargpt_rl.model.v1.configuration import V1ImageTokenizerConfig
from vargpt_rl.model.v1.image_tokenizer import V1ImageTokenizer, conv_of_scale

SIDE = 16 * V1_SIDES[-1]
DEPTH = 8


@pytest.fixture(scope="module")
def tokenizer(v1_model):
    return v1_model.image_tokenizer


@pytest.fixture(scope="module")
def schedule(tokenizer):
    return tokenizer.schedule_for(SIDE)


def features(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, DEPTH, *[V1_SIDES[-1]] * 2, generator=torch.Generator().manual_seed(seed))


def test_labels_are_the_nearest_codes_one_by_one(tokenizer, schedule):
    given_features = features()
    with torch.no_grad():
        labels = tokenizer.label(given_features, torch.zeros_like(given_features), schedule[-1])
    codes = tokenizer.codebook.weight
    for b in range(2):
        for i, cell in enumerate(given_features[b].flatten(1).T):
            assert labels[b, i] == (codes - cell).square().sum(1).argmin()


def test_equal_codes_give_the_first_of_them(tokenizer):
    config = V1ImageTokenizerConfig(codes=5, latent_channels=2, sides=(1,), base_channels=4, norm_groups=2)
    twin = V1ImageTokenizer(config)
    torch.nn.init.constant_(twin.codebook.weight, 1.0)
    assert twin.label(torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1), (1, 1)).tolist() == [[[0]]]


@settings(max_examples=20)
@given(seed=st.integers(0, 99))
def test_replaying_indices_gives_the_very_inputs_and_sums(tokenizer, schedule, seed):
    with torch.no_grad():
        first = tokenizer.quantise(features(seed), schedule)
        again = tokenizer.replay(first.labels_BLs, schedule)
    assert first.labels_BLs.dtype == torch.int32
    assert first.labels_BLs.shape == (2, token_count(schedule), 1)
    assert first.labels_BLs.min() >= 0 and first.labels_BLs.max() < V1_CODES
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_each_scale_sees_coarser_scales_only(tokenizer, schedule):
    with torch.no_grad():
        labels = tokenizer.quantise(features(), schedule).labels_BLs
        plain = tokenizer.replay(labels, schedule).inputs_BLd
        for k, at in enumerate(scale_slices(schedule)):
            changed = labels.clone()
            changed[:, at] = (changed[:, at] + 1) % V1_CODES
            differs_L = (tokenizer.replay(changed, schedule).inputs_BLd != plain).any(0).any(-1)
            assert torch.equal(differs_L, scale_index(schedule)[1:] > k)


def test_scales_leave_less_and_less_over(tokenizer, schedule):
    """Of features that are sums of codes, which random ones are not."""
    with torch.no_grad():
        labels = torch.randint(0, V1_CODES, (4, token_count(schedule), 1), generator=torch.Generator().manual_seed(1))
        target = tokenizer.replay(labels, schedule).summed_Bdhw
        found = tokenizer.quantise(target, schedule).summed_Bdhw
    assert (target - found).square().mean() < 0.5 * target.square().mean()


@pytest.mark.parametrize(("scales", "convs"), [(1, 4), (6, 4), (10, 4), (10, 3), (5, 1)])
def test_neighbouring_scales_share_a_convolution(scales, convs):
    found = conv_of_scale(scales, convs)
    assert len(found) == scales and found == sorted(found) and set(found) <= set(range(convs))
    assert scales < convs or set(found) == set(range(convs))


def test_only_the_models_own_size_is_drawn(tokenizer):
    for size in ((SIDE, 2 * SIDE), (2 * SIDE,), (SIDE - 1,)):
        with pytest.raises(ValueError, match=f"this model draws {SIDE}x{SIDE} pixels only"):
            tokenizer.schedule_for(*size)


def test_half_precision_sums_in_the_type_that_is_asked_for(v1_checkpoint, schedule, tokenizer):
    half = load_model(v1_checkpoint, torch.bfloat16).image_tokenizer
    with torch.no_grad():
        exact, rough = (t.quantise(features(), schedule) for t in (tokenizer, half))
    assert rough.summed_Bdhw.dtype == torch.float32
    assert (exact.labels_BLs == rough.labels_BLs).float().mean() > 0.9
