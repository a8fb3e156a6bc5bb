"""Quantising, replaying and packing bits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vargpt_rl.model.bits import Bits, pack, resize, to_codes, to_map, to_tokens, unpack
from vargpt_rl.model.scales import scale_index, scale_slices, schedule_for, token_count

DEPTH = 8
sides = st.integers(1, 8).map(lambda n: 16 * n)


def features(height: int, width: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, DEPTH, height // 16, width // 16, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 40), st.integers(1, 33), st.integers(0, 2**32 - 1))
def test_unpack_is_the_inverse_of_pack(tokens, depth, seed):
    bits_Ld = np.random.default_rng(seed).integers(0, 2, (tokens, depth), np.uint8)
    packed = pack(bits_Ld)
    assert len(packed) == -(-tokens * depth // 8)
    unpacked = unpack(packed, tokens, depth)
    assert unpacked.dtype == np.uint8
    assert (unpacked == bits_Ld).all()


@given(st.integers(0, 40), st.integers(1, 3), st.integers(2, 70_000), st.integers(0, 2**32 - 1))
def test_labels_of_any_number_of_values_are_packed_as_tightly_as_their_width_allows(tokens, depth, values, seed):
    labels_Ls = np.random.default_rng(seed).integers(0, values, (tokens, depth), np.int32)
    packed = pack(labels_Ls, values)
    assert len(packed) == -(-tokens * depth * (values - 1).bit_length() // 8)
    unpacked = unpack(packed, tokens, depth, values)
    assert unpacked.dtype == (np.uint8 if values <= 256 else np.int32)
    assert unpacked.shape == labels_Ls.shape and (unpacked == labels_Ls).all()


def test_indices_of_a_codebook_of_4096_take_twelve_bits_each():
    packed = pack(np.array([[0xABC], [0x123]], np.int32), 4096)
    assert packed.hex() == "abc123"
    assert len(pack(np.zeros((680, 1), np.int32), 4096)) == 1020


def test_unpack_rejects_out_of_range_labels():
    packed = pack(np.array([[7]], np.uint8), 8)
    with pytest.raises(ValueError, match="found label 7, expected less than 6"):
        unpack(packed, 1, 1, 6)
    with pytest.raises(ValueError, match="1 bytes, expected 2 for 1 tokens of 1 labels below 4096"):
        unpack(packed, 1, 1, 4096)


@settings(max_examples=40)
@given(sides, sides, st.integers(0, 99))
def test_replaying_bits_gives_the_very_inputs_and_sums(height, width, seed):
    schedule = schedule_for(height, width)
    first = Bits().quantise(features(height, width, seed=seed), schedule)
    again = Bits().replay(first.labels_BLs, schedule)
    assert first.labels_BLs.dtype == torch.uint8
    assert first.labels_BLs.shape == (2, token_count(schedule), DEPTH)
    assert first.inputs_BLd.shape == (2, token_count(schedule) - 1, DEPTH)
    # bitwise: what a learner rebuilds is what was drawn
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_codes_are_signs_on_the_unit_sphere():
    codes = to_codes(torch.tensor([[[0, 1, 1, 0]]], dtype=torch.uint8))
    assert codes.tolist() == [[[-0.5, 0.5, 0.5, -0.5]]]


def test_a_zero_feature_is_bit_zero():
    assert Bits().quantise(torch.zeros(1, DEPTH, 1, 1), schedule_for(16)).labels_BLs.sum() == 0


def test_tokens_are_row_major_and_resizing_to_the_same_grid_does_nothing():
    tokens = torch.arange(6.0).view(1, 6, 1)
    assert to_map(tokens, (2, 3))[0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert torch.equal(to_tokens(to_map(tokens, (2, 3))), tokens)
    assert resize(to_map(tokens, (2, 3)), (2, 3)).tolist() == to_map(tokens, (2, 3)).tolist()


def test_flips_leave_the_first_scale_labels_and_change_all_later_inputs():
    schedule = schedule_for(128)
    given = features(128, 128)
    plain = Bits().quantise(given, schedule)
    flipped = Bits().quantise_flipped(given, schedule, torch.tensor([[0.0], [1.0]]).expand(2, len(schedule)))
    assert torch.equal(flipped.labels_BLs[0], plain.labels_BLs[0]), "probability 0 flips nothing"
    assert torch.equal(flipped.inputs_BLd[0], plain.inputs_BLd[0])
    assert torch.equal(flipped.labels_BLs[1, 0], plain.labels_BLs[1, 0]), "labels of the first scale are not flipped"
    differs_L = (flipped.inputs_BLd[1] != plain.inputs_BLd[1]).any(-1)
    assert differs_L.all(), "every later input sees the flips"
    assert (flipped.labels_BLs[1, 1:] != plain.labels_BLs[1, 1:]).any(), "and later labels repair them"


def test_labels_after_flips_are_those_of_the_true_remainder():
    # All bits of scale 0 flipped: the remainder at scale 1 is what is left over from the opposite code.
    given = features(32, 32, batch=1)
    flipped = Bits().quantise_flipped(given, schedule_for(32), torch.ones(1, 2))
    wrong = -to_codes(flipped.labels_BLs[:, :1])
    rest = to_tokens(given) - wrong
    assert torch.equal(flipped.labels_BLs[:, 1:], (rest > 0).to(torch.uint8))


@settings(max_examples=40)
@given(sides, sides, st.integers(0, 99))
def test_labels_after_flips_are_what_the_flipped_bits_left_over(height, width, seed):
    schedule, given = schedule_for(height, width), features(height, width, seed=seed)
    rates_BK = torch.randint(0, 2, (2, len(schedule)), generator=torch.Generator().manual_seed(seed)).float()
    flipped = Bits().quantise_flipped(given, schedule, rates_BK)
    fed_BLd = flipped.labels_BLs ^ rates_BK[:, scale_index(schedule), None].to(torch.uint8)
    # bitwise: all that is fed on, and so every later label, comes of the flipped bits
    again = Bits().replay(fed_BLd, schedule)
    assert torch.equal(flipped.inputs_BLd, again.inputs_BLd) and torch.equal(flipped.summed_Bdhw, again.summed_Bdhw)
    for k, at in enumerate(scale_slices(schedule)):
        before = fed_BLd.clone()
        before[:, at.start :] = 0
        codes_BLd = to_codes(before) * (torch.arange(fed_BLd.shape[1]) < at.start)[:, None]
        summed = sum(
            F.interpolate(to_map(codes_BLd[:, part], grid), schedule[-1], mode="bilinear")
            for part, grid in zip(scale_slices(schedule), schedule, strict=True)
        )
        rest_Bnd = to_tokens(F.adaptive_avg_pool2d(given - summed, schedule[k]))
        sure = rest_Bnd.abs() > 1e-5  # nearer to zero the order of additions decides
        assert (~sure).sum() <= max(1, 0.01 * sure.numel())
        assert torch.equal((rest_Bnd > 0)[sure], flipped.labels_BLs[:, at].bool()[sure])


def test_flips_have_a_rate_for_each_image_and_scale():
    schedule, given = schedule_for(256), features(256, 256)
    rates_BK = torch.zeros(2, len(schedule))
    rates_BK[0, -1], rates_BK[1, -2] = 0.3, 1.0
    plain = Bits().quantise(given, schedule)
    flipped = Bits().quantise_flipped(given, schedule, rates_BK, torch.Generator().manual_seed(0))
    differs_BL = (flipped.inputs_BLd != plain.inputs_BLd).any(-1)
    assert not differs_BL[0].any(), "after the last scale nothing is fed on"
    assert torch.equal(differs_BL[1], scale_index(schedule)[1:] == len(schedule) - 1)
    # The last scale is added as it is: five standard errors of its 2048 bits.
    assert (flipped.summed_Bdhw != plain.summed_Bdhw)[0].float().mean().item() == pytest.approx(0.3, abs=0.05)


def test_flips_follow_the_generator_and_the_probability():
    schedule, given = schedule_for(256), torch.zeros(1, 32, 16, 16)

    def fed(seed: int) -> torch.Tensor:
        rates = torch.full((1, len(schedule)), 0.25)
        return Bits().quantise_flipped(given, schedule, rates, torch.Generator().manual_seed(seed)).summed_Bdhw

    assert torch.equal(fed(1), fed(1))
    assert not torch.equal(fed(1), fed(2))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"grid \(2, 2\).* schedule .*ends at \(4, 4\)"):
        Bits().quantise(features(32, 32), schedule_for(64))
    bits = Bits().quantise(features(64, 64), schedule_for(64)).labels_BLs
    with pytest.raises(ValueError, match="20 image tokens.* has 21"):
        Bits().replay(bits[:, 1:], schedule_for(64))
    with pytest.raises(ValueError, match="2 bytes, expected 3 for 5 tokens of 4 bits"):
        unpack(b"ab", 5, 4)


def test_each_scale_sees_coarser_scales_only():
    schedule = schedule_for(64)
    bits = Bits().quantise(features(64, 64), schedule).labels_BLs
    scale_L = scale_index(schedule)
    for k in range(len(schedule)):
        changed = bits.clone()
        changed[:, scale_L == k] ^= 1
        again, plain = (Bits().replay(each, schedule).inputs_BLd for each in (changed, bits))
        differs_L = (again != plain).any(0).any(-1)
        assert torch.equal(differs_L, scale_L[1:] > k)
