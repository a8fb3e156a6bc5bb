"""Metrics on held-out prompts and pairs."""

import math

import numpy as np
import pytest
from PIL import Image

from vargpt_rl.data.samples import Prompt
from vargpt_rl.data.sources import ShapesConfig, ShapesSource
from vargpt_rl.evaluate.held_out import Fidelity, preference_scores


def test_margin_is_the_change_of_the_log_ratio():
    scores = preference_scores([-8.0, -9.0], [-12.0, -10.0], [-10.0, -10.0], [-10.0, -10.0], beta=0.5)
    assert scores["margin"] == pytest.approx(0.5 * np.mean([4.0, 1.0]))
    assert scores["accuracy"] == 1.0 == scores["accuracy_high"] and 0 < scores["accuracy_low"] < 0.5
    assert scores["chosen_logp_change"] == pytest.approx(1.5)


def test_pairs_of_one_prompt_widen_the_interval_of_accuracy():
    chosen, rejected = np.zeros(40), np.repeat([-1.0, 1.0, -1.0, -1.0], 10)
    alone, clustered = (
        preference_scores(chosen, rejected, chosen, chosen, 0.1, prompts)
        for prompts in (None, [f"p{k // 10}" for k in range(40)])
    )
    assert alone["accuracy"] == clustered["accuracy"] == 0.75
    assert clustered["accuracy_low"] < alone["accuracy_low"] < 0.75 < alone["accuracy_high"]


def test_unchanged_policy_has_no_margin():
    scores = preference_scores([-8.0], [-9.0], [-8.0], [-9.0], beta=0.1)
    assert scores["margin"] == 0.0 and scores["accuracy"] == 0.0


def test_fidelity_is_peak_signal_to_noise_ratio():
    source = ShapesSource(ShapesConfig())
    keys = ["clean/1/a circle", "clean/2/a square"]
    off = np.clip(np.asarray(source.load(keys[1], 64), int) - 10, 0, 255)
    error = np.square(off - np.asarray(source.load(keys[1], 64), float)).mean()
    images = [source.load(keys[0], 64), Image.fromarray(off.astype(np.uint8))]
    same, shifted = Fidelity(source, 64)(images, [Prompt(key, "") for key in keys])
    assert same == 100.0
    assert shifted == pytest.approx(10 * math.log10(255**2 / error))
