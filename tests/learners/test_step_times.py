"""Seconds of a step are counted once, for the innermost part."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from learners import step_times
from learners.step_times import PARTS, StepClock, TimedSteps


@pytest.fixture
def clock(monkeypatch):
    """A clock at which each look costs a second."""
    ticks = iter(range(100))
    monkeypatch.setattr(step_times.time, "perf_counter", lambda: float(next(ticks)))
    return StepClock()


def test_inner_parts_do_not_count_for_the_outer(clock):
    with clock.measure("backward"):
        with clock.measure("forward"):
            pass
        with clock.measure("optimizer"):
            pass
    with clock.measure("data"):
        pass
    found = clock.take()
    assert found == {f"time/{part}": 0.0 for part in PARTS} | {
        "time/forward": 1.0,
        "time/optimizer": 1.0,
        "time/backward": 3.0,
        "time/data": 1.0,
    }


def test_a_part_that_fails_is_counted(clock):
    with pytest.raises(KeyError), clock.measure("backward"), clock.measure("forward"):
        raise KeyError
    assert clock.take()["time/forward"] == 1.0
    assert sum(clock.take().values()) == 0.0, "each look starts anew"


class FakeTrainer:
    """The methods of a trainer that the mixin extends, each taking a second; waits for 0.5 of its data."""

    def __init__(self):
        self.deepspeed = SimpleNamespace(step=lambda: None)
        self.waited = 0.0
        self.logged: list[dict] = []

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        return max_steps

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.waited += 0.5
        return [next(epoch_iterator)], None

    @contextmanager
    def compute_loss_context_manager(self):
        yield

    def training_step(self, model, inputs, num_items_in_batch=None):
        with self.compute_loss_context_manager():
            pass
        self.deepspeed.step()
        return 0.25

    def log(self, logs, start_time=None):
        self.logged.append(logs)


class TimedFake(TimedSteps, FakeTrainer):
    def seconds_waited(self) -> float:
        return self.waited


def test_a_trainer_logs_the_parts_of_its_steps(clock):
    trainer = TimedFake()
    trainer.clock = clock
    assert trainer._prepare_for_training(2, None, None) == 2
    for _ in range(2):
        trainer.get_batch_samples(iter([1]), 1, "cpu")
        assert trainer.training_step(None, {}) == 0.25
        trainer.log({"loss": 1.0})
    expected = {"time/data": 0.5, "time/wait": 0.5, "time/forward": 1.0, "time/backward": 3.0, "time/optimizer": 1.0}
    assert trainer.logged == [{"loss": 1.0} | expected] * 2
    trainer.log({"train_runtime": 9.0})
    assert trainer.logged[-1] == {"train_runtime": 9.0}, "only the log of a step has them"
    assert clock.total == {part: 2 * expected[f"time/{part}"] for part in PARTS}


def test_utilisation_is_the_share_of_the_peak_without_waiting(clock):
    clock.peak = 10.0
    assert clock.whole() == {}, "nothing was counted yet"
    clock.flops = 30
    clock.seconds |= {"forward": 2.0, "backward": 4.0, "wait": 94.0}
    assert clock.take()["time/mfu"] == 0.5
    clock.flops = 30
    clock.seconds["data"] += 2.0
    assert clock.take()["time/mfu"] == 1.5
    assert clock.whole() == {"mfu": 0.75}
    assert "time/mfu" not in clock.take(), "each look starts anew"
