"""The baseline of the bench draws what is drawn with caches."""

import pytest
import torch

from vargpt_rl.bench import rollout
from vargpt_rl.model.generate import SamplingConfig, generate_images


@pytest.mark.parametrize("side", [48, 128])
def test_drawing_without_caches_gives_the_same_images(model, chat, side):
    args = (model, *rollout.prompts(chat, 3), [4, 5, 6], (side, side), SamplingConfig(cfg=1.0, tau=1.0))
    fast, slow = generate_images(*args), rollout.redraw(*args)
    # float32 in another order of additions: a bit differs where noise and probability agree to some six digits
    assert (fast.labels_BLs != slow.labels_BLs).float().mean() < 1e-3
    assert fast.summed_Bdhw.shape == slow.summed_Bdhw.shape
    assert len(fast.labels_BLs.unique(dim=0)) == 3, "seeds and prompts count"


def test_a_measurement_has_times_memory_and_the_share_of_equal_bits(model, chat):
    found = rollout.measure(model, chat, 32, 2, rounds=1)
    assert found.same > 0.99
    assert min(found.draw_s, found.redraw_s) > 0
    assert 0 < found.draw_bytes < 100e6 and 0 < found.redraw_bytes < 100e6


def test_memory_is_what_the_allocator_handed_out():
    def allocate() -> None:
        torch.ones(1000, 1000).sum()

    assert rollout.memory(allocate) == pytest.approx(4e6, rel=0.01)
