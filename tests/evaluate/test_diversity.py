"""Diversity of groups of images, against distances counted one by one."""

from itertools import combinations

import numpy as np
import pytest

from vargpt_rl.evaluate.diversity import diversity
from vargpt_rl.model.bits import pack
from vargpt_rl.model.scales import scale_slices

SCHEDULE = ((1, 1), (2, 2))
BYTES = 4


def images(*shape: int) -> np.ndarray:
    """Random packed images, uint8 [..., L, bytes of a token]."""
    return np.random.default_rng(0).integers(0, 256, (*shape, 5, BYTES)).astype(np.uint8)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    differing = np.unpackbits(one ^ other, axis=-1)
    return float(np.mean([differing[at].mean() for at in scale_slices(SCHEDULE)]))


def test_diversity_is_the_mean_distance_of_pairs_within_and_between_groups():
    drawn = images(3, 4)
    drawn[1] = drawn[1, :1]  # a group of equal images
    within = np.mean([distance(a, b) for group in drawn for a, b in combinations(group, 2)])
    between = np.mean([distance(a, b) for one, other in combinations(drawn, 2) for a in one for b in other])
    found = diversity([[image.tobytes() for image in group] for group in drawn], SCHEDULE)
    assert found == {"diversity": pytest.approx(within), "diversity/prompts": pytest.approx(between)}


def test_equal_images_have_no_diversity():
    image = images().tobytes()
    assert diversity([[image, image]], SCHEDULE) == {"diversity": 0.0}


def test_tokens_need_not_fill_bytes():
    labels = np.random.default_rng(0).integers(0, 4096, (2, 5, 1))
    bits = [[int(bit) for label in image[:, 0] for bit in f"{label:012b}"] for image in labels]
    differing = np.not_equal(*bits).reshape(5, 12)
    found = diversity([[pack(image, 4096) for image in labels]], SCHEDULE)
    assert found["diversity"] == pytest.approx((differing[0].mean() + differing[1:].mean()) / 2)
