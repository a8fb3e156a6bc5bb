"""Held-out measures are exact functions of what workers return; nothing scored is not a score of zero."""

import math

import numpy as np
import pytest
from PIL import Image

from vargpt_rl.data.shapes import render, sample_scene
from vargpt_rl.data.sources import ShapesConfig, ShapesSource
from vargpt_rl.data.types import Prompt
from vargpt_rl.evaluate.held_out import Fidelity, mean_and_error, preference_scores, shapes_check, task_scores


def test_nothing_scored_is_an_error():
    with pytest.raises(ValueError, match="nothing was scored"):
        mean_and_error([])


def test_mean_and_standard_error():
    mean, error = mean_and_error([0.0, 1.0, 1.0, 0.0])
    assert mean == 0.5
    assert error == pytest.approx(math.sqrt(1 / 3) / 2)


def test_scores_are_by_task():
    scores = task_scores(["a circle", "a red circle", "a blue square"], [1.0, 0.0, 1.0])
    assert scores["single_object"] == 1.0 and scores["colours"] == 0.5
    assert scores["overall"] == pytest.approx(2 / 3) and scores["n"] == 3


def test_a_margin_is_the_growth_of_the_log_ratio():
    scores = preference_scores([-8.0, -9.0], [-12.0, -10.0], [-10.0, -10.0], [-10.0, -10.0], beta=0.5)
    assert scores["margin"] == pytest.approx(0.5 * np.mean([4.0, 1.0]))
    assert scores["accuracy"] == 1.0
    assert scores["chosen_logp_change"] == pytest.approx(1.5)


def test_no_change_is_no_preference():
    scores = preference_scores([-8.0], [-9.0], [-8.0], [-9.0], beta=0.1)
    assert scores["margin"] == 0.0 and scores["accuracy"] == 0.0


def test_the_check_reads_images():
    rng = np.random.default_rng(0)
    scene = sample_scene(rng, "colours")
    image = render(scene, 128, "clean", rng)
    assert shapes_check([image, image], [scene.caption, "four red crosses"]) == [1.0, 0.0]


def test_fidelity_is_the_ratio_of_peak_to_noise():
    source = ShapesSource(ShapesConfig())
    keys = ["clean/1/a circle", "clean/2/a square"]
    off = np.clip(np.asarray(source.load(keys[1], 64), int) - 10, 0, 255)
    error = np.square(off - np.asarray(source.load(keys[1], 64), float)).mean()
    images = [source.load(keys[0], 64), Image.fromarray(off.astype(np.uint8))]
    same, shifted = Fidelity(source, 64)(images, [Prompt(key, "") for key in keys])
    assert same == 100.0
    assert shifted == pytest.approx(10 * math.log10(255**2 / error))
