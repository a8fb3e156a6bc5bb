"""The benchmark's baseline without caches generates the same images."""

import pytest

from vargpt_rl.bench import rollout
from vargpt_rl.model.generate import SamplingConfig, generate_images


@pytest.mark.parametrize("side", [48, 128])
def test_baseline_generates_the_same_images(model, chat, side):
    args = (model, *rollout.prompts(chat, 3), [4, 5, 6], (side, side), SamplingConfig(cfg=1.0, tau=1.0))
    fast, slow = generate_images(*args), rollout.redraw(*args)
    # float32 sums in another order: a bit may differ if noise and probability agree to about six digits
    assert (fast.labels_BLs != slow.labels_BLs).float().mean() < 1e-3
    assert fast.summed_Bdhw.shape == slow.summed_Bdhw.shape
    assert len(fast.labels_BLs.unique(dim=0)) == 3, "images depend on seeds and prompts"


def test_measures_times_memory_and_equal_bits(model, chat):
    found = rollout.measure(model, chat, 32, 2, rounds=1)
    assert found.same > 0.99
    assert min(found.draw_s, found.redraw_s) > 0
    assert 0 < found.draw_bytes < 100e6 and 0 < found.redraw_bytes < 100e6
