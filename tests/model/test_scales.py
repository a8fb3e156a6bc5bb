"""Scale schedules: the release's counts, and what holds at any size."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vargpt_rl.model.scales import (
    SCHEDULES,
    full_schedule,
    grid_positions,
    scale_index,
    scale_slices,
    schedule_for,
    size_for,
    token_count,
)

sides = st.integers(1, 128).map(lambda n: 16 * n)


@pytest.mark.parametrize(
    ("side", "scales", "tokens"), [(256, 7, 521), (512, 10, 2521), (768, 12, 6425), (1024, 13, 10521)]
)
def test_square_schedules_are_the_releases(side, scales, tokens):
    schedule = schedule_for(side)
    assert (len(schedule), token_count(schedule)) == (scales, tokens)
    assert schedule == SCHEDULES[1.0][:scales]


@given(sides, sides)
def test_every_schedule_grows_to_its_own_grid(height, width):
    schedule = schedule_for(height, width)
    assert schedule[-1] == (height // 16, width // 16)
    for (h0, w0), (h1, w1) in pairwise(schedule):
        assert h0 <= h1
        assert w0 <= w1
        assert (h0, w0) != (h1, w1)
    slices = scale_slices(schedule)
    assert slices[0].start == 0
    assert slices[-1].stop == token_count(schedule)
    lengths = [at.stop - at.start for at in slices]
    assert lengths == [h * w for h, w in schedule]
    assert scale_index(schedule).bincount().tolist() == lengths


@given(sides, sides)
def test_positions_lie_on_the_reference_grid_of_the_aspect_ratio(height, width):
    schedule = schedule_for(height, width)
    positions_L2 = grid_positions(schedule)
    rows, columns = full_schedule(height, width)[-1]
    assert positions_L2.shape == (token_count(schedule), 2)
    assert (positions_L2 >= 0).all()
    # A grid finer than the reference grid may round its last cell up to the edge.
    fits = torch.tensor([rows >= schedule[-1][0], columns >= schedule[-1][1]])
    assert (positions_L2 <= torch.tensor([rows, columns]) - fits.int()).all()
    assert positions_L2[0].tolist() == [0, 0]


def test_a_coordinate_means_the_same_place_at_every_scale_and_resolution():
    # 2x2 on 64x64: cells start at 0 and 32, row-major.
    assert grid_positions(schedule_for(32))[1:].tolist() == [[0, 0], [0, 32], [32, 0], [32, 32]]
    assert torch.equal(grid_positions(schedule_for(256)), grid_positions(schedule_for(512))[:521])


def test_positions_round_half_to_even():
    tall = schedule_for(*size_for(256, aspect=1 / 3))
    at = scale_slices(tall)[tall.index((6, 2))]
    # Six rows on 111: 18.5 apart.
    assert grid_positions(tall)[at][::2, 0].tolist() == [0, 18, 37, 56, 74, 92]


@pytest.mark.parametrize(("height", "width"), [(0, None), (-16, None), (250, None), (256, 100), (100, 256), (256, 0)])
def test_sides_must_be_positive_multiples_of_16(height, width):
    with pytest.raises(ValueError, match="positive multiple of 16"):
        schedule_for(height, width)


@pytest.mark.parametrize("resolution", [256, 512, 768, 1024])
@pytest.mark.parametrize("ratio", sorted(SCHEDULES))
def test_sizes_of_all_aspect_ratios_are_the_releases(resolution, ratio):
    scales = len(schedule_for(resolution))
    height, width = size_for(resolution, aspect=1 / ratio)
    assert schedule_for(height, width) == SCHEDULES[ratio][:scales]
    area = height * width / resolution**2
    assert 0.75 < area < 1.3, "about as many pixels as the square"


def test_there_are_fifteen_aspect_ratios_and_squares_are_the_default():
    assert len(SCHEDULES) == 15
    assert size_for(512) == (512, 512)
    assert size_for(256, aspect=2.0)[1] == 2 * size_for(256, aspect=2.0)[0]


@pytest.mark.parametrize("resolution", [240, 2048])
def test_other_resolutions_have_no_other_sizes(resolution):
    with pytest.raises(ValueError, match=f"resolution {resolution} has no sizes at other aspect ratios"):
        size_for(resolution, aspect=2.0)
