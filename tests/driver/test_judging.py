"""Rewards are kept with their terms, and a file of other rollouts is refused."""

import pytest

from rewards.combined import Total
from vargpt_rl.data.rollouts import Rollouts
from vargpt_rl.data.samples import Prompt, Sample, Winner
from vargpt_rl.driver.judging import read_rewards, write_rewards

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
