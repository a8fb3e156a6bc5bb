"""Progress of a run: bars on a terminal, lines elsewhere."""

import io
import logging

import pytest
from rich.console import Console

from vargpt_rl.driver.progress import RunProgress, duration

STEPS = {"pretrain": 100.0, "pretrain/swap": 0.0, "iter-00/sft": 300.0, "iter-00/after_sft": 100.0}


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def messages(caplog):
    caplog.set_level(logging.INFO, logger="vargpt_rl")
    return caplog


def progress_to(clock, terminal=False, width=100):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width)
    return RunProgress(console, clock)


def test_lines_say_step_of_steps_time_left_and_score(clock, messages):
    progress = progress_to(clock)
    progress.plan(STEPS, [])
    progress.enter("pretrain")
    clock.now = 50.0
    progress.leave("pretrain")
    progress.score = "score 0.900"
    progress.enter("pretrain/swap")
    progress.leave("pretrain/swap")
    progress.enter("iter-00/sft")
    assert messages.messages == [
        "[1/4] pretrain",
        "[2/4] pretrain: swap, about 3:20 left, score 0.900",
        "[3/4] iteration 0: SFT, about 3:20 left",
    ]


def test_a_long_part_is_told_every_30_s(clock, messages):
    progress = progress_to(clock)
    progress.plan(STEPS, ["pretrain", "pretrain/swap"])
    progress.enter("iter-00/sft")
    for step in range(1, 61):
        clock.now = float(step)
        progress.part("sft", step, 60, f"loss {1 / step:.2f}")
    told = messages.messages
    assert len(told) == 3
    assert told[1].startswith("[3/4] iteration 0: SFT, about 0:54 left") and told[1].endswith(
        "sft 30/60 1.0/s loss 0.03"
    )


def test_time_left_counts_what_this_start_has_done(clock):
    progress = progress_to(clock)
    progress.plan(STEPS, ["pretrain", "pretrain/swap"])
    assert progress.share == 0.2 and progress.left() is None
    progress.enter("iter-00/sft")
    clock.now = 30.0
    progress.leave("iter-00/sft")
    assert progress.share == 0.8 and progress.left() == pytest.approx(10.0)


def test_the_first_part_of_a_step_stands_for_it_and_never_goes_back(clock):
    progress = progress_to(clock)
    progress.plan({"iter-00/grpo": 1.0}, [])
    progress.enter("iter-00/grpo")
    progress.part("grpo", 5, 10)
    for done in (1, 2):
        progress.part("generate_images", done, 2)
    assert progress.share == pytest.approx(0.475)
    progress.part("grpo", 4, 10)
    assert progress.share == pytest.approx(0.475)


@pytest.mark.parametrize("width", [60, 100])
def test_a_terminal_has_two_bars_that_disappear(clock, width):
    progress = progress_to(clock, terminal=True, width=width)
    progress.plan(STEPS, [])
    progress.say("starting 2 workers and 2 learner ranks")
    progress.enter("pretrain")
    progress.part("pretrain", 0, 20)
    clock.now = 10.0
    progress.part("pretrain", 10, 20, "loss 0.500")
    shown = progress.bars.get_renderable()
    plain = Console(file=io.StringIO(), width=width)
    plain.print(shown)
    text = " ".join(plain.file.getvalue().split())
    assert "[1/4] pretrain" in text and "10/20 1.0/s loss 0.500" in text
    progress.close()
    assert progress.bars is None


def test_a_run_that_is_not_planned_is_no_error(clock, messages):
    progress = progress_to(clock)
    progress.enter("iter-00/sft")
    progress.part("sft", 1, 2)
    progress.leave("iter-00/sft")
    progress.close()
    assert progress.left() is None


def test_durations():
    assert [duration(5), duration(65), duration(3723)] == ["0:05", "1:05", "1:02:03"]
