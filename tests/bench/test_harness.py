"""The benchmarks' measurements."""

import pytest
import torch

from vargpt_rl.bench.harness import peak_memory, timed


def test_peak_memory_is_that_of_the_allocator():
    def allocate() -> None:
        torch.ones(1000, 1000).sum()
        torch.ones(500, 1000).sum()

    assert peak_memory(allocate) == pytest.approx(4e6, rel=0.01)


def test_timed_returns_the_result():
    seconds, result = timed(divmod, 7, 2)
    assert seconds >= 0
    assert result == (3, 1)
