import pytest

from learners.group import Patience, StalledError


def test_waits_without_progress_add_up():
    patience = Patience(10)
    for _ in range(10):
        patience.wait(1)
        patience.check()
    patience.see_progress()
    patience.wait(10)
    patience.check()
    patience.wait(1)
    with pytest.raises(StalledError, match="no progress in 11 s"):
        patience.check()
    patience.begin()
    patience.check()


def test_slow_steps_are_not_taken_for_a_hang():
    patience = Patience(10)
    patience.see_progress()
    patience.wait(8)
    patience.see_progress()
    patience.wait(24)
    patience.check()
    patience.wait(1)
    with pytest.raises(StalledError):
        patience.check()
