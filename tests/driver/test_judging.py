"""Rewards are kept with their terms, a file of other rollouts is refused, and a lost server is restarted."""

from contextlib import nullcontext

import pytest

from rewards.combined import RewardsLostError
from rewards.total import Total
from tests.helpers.driver import WorkersDouble, stage_context
from vargpt_rl.data.rollouts import Rollouts
from vargpt_rl.data.samples import Prompt, Sample, Winner
from vargpt_rl.driver import judging
from vargpt_rl.driver.judging import read_rewards, score, write_rewards

PROMPT = Prompt("1", "a star")
SAMPLE = Sample(PROMPT, b"", 32, 0, {}, 0, "")
ROLLOUTS = Rollouts([SAMPLE, SAMPLE], {"1": Winner(PROMPT, b"", 32, "key")})


def test_rewards_are_read_as_they_were_written(tmp_path):
    write_rewards(tmp_path / "r.json", [Total(0.5, {"sharp": 1.0, "ocr": 0.0}), None, 2.0])
    rewards = read_rewards(tmp_path / "r.json", ROLLOUTS)
    assert rewards.samples == [0.5, None] and rewards.winners == {"1": 2.0}
    assert rewards.samples[0].terms == {"sharp": 1.0, "ocr": 0.0}


@pytest.mark.parametrize("content", ["", "[1", "[[1.0, null]]", "{}", "[1, 2, 3]"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(ValueError, match=r"r\.json: not the rewards of 3 images"):
        read_rewards(tmp_path / "r.json", ROLLOUTS)


class LosingWorkers(WorkersDouble):
    """Lose the server of rewards at the calls with these numbers."""

    def __init__(self, *lost: int):
        super().__init__()
        self.lost = lost

    def reward(self, items, resolution, reward):
        if len(self.calls) in self.lost:
            raise RewardsLostError("the server of rewards died")
        return [0.5] * len(items)


class LiveDouble:
    """Rewards that report nothing."""

    def renewed(self):
        return self

    def report(self):
        return {}


def test_a_lost_server_is_started_again_once(tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "running", lambda context, reward: nullcontext(LiveDouble()))
    settings = ("rollout.keep_every=2", "rollout.batch_size=2")
    context = stage_context(tmp_path, *settings, pool=LosingWorkers(2))
    assert score(context, [(PROMPT, b"")] * 6, lambda: None, "samples")[0] == [0.5] * 6
    assert (
        context.run.state["events"] == ["the server of rewards died: restarted"] and context.run.state["restarts"] == 1
    )
    assert len(context.pool.calls) == 4, "the first part was kept"
    with pytest.raises(RewardsLostError):
        score(stage_context(tmp_path / "b", pool=LosingWorkers(1, 2)), [(PROMPT, b"")], lambda: None)
