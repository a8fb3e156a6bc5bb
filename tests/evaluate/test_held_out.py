"""Held-out measures are exact functions of what workers return; nothing scored is not a score of zero."""

import math

import numpy as np
import pytest
from PIL import Image

from vargpt_rl.data.samples import Prompt
from vargpt_rl.data.sources import ShapesConfig, ShapesSource
from vargpt_rl.evaluate.held_out import Fidelity, preference_scores


def test_a_margin_is_the_growth_of_the_log_ratio():
    scores = preference_scores([-8.0, -9.0], [-12.0, -10.0], [-10.0, -10.0], [-10.0, -10.0], beta=0.5)
    assert scores["margin"] == pytest.approx(0.5 * np.mean([4.0, 1.0]))
    assert scores["accuracy"] == 1.0
    assert scores["chosen_logp_change"] == pytest.approx(1.5)


def test_no_change_is_no_preference():
    scores = preference_scores([-8.0], [-9.0], [-8.0], [-9.0], beta=0.1)
    assert scores["margin"] == 0.0 and scores["accuracy"] == 0.0


def test_fidelity_is_the_ratio_of_peak_to_noise():
    source = ShapesSource(ShapesConfig())
    keys = ["clean/1/a circle", "clean/2/a square"]
    off = np.clip(np.asarray(source.load(keys[1], 64), int) - 10, 0, 255)
    error = np.square(off - np.asarray(source.load(keys[1], 64), float)).mean()
    images = [source.load(keys[0], 64), Image.fromarray(off.astype(np.uint8))]
    same, shifted = Fidelity(source, 64)(images, [Prompt(key, "") for key in keys])
    assert same == 100.0
    assert shifted == pytest.approx(10 * math.log10(255**2 / error))
