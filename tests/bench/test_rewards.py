"""Healthy rewards score everything next to one that hangs."""

import re

from vargpt_rl.bench import rewards


def test_hanging_reward_costs_time_but_no_scores(capsys):
    assert rewards.main(["images=16", "batch=8", "side=32", "timeout_s=0.5"]) == 0
    shown = capsys.readouterr().out
    speeds = [float(speed) for speed in re.findall(r"(\d+\.\d)\s+16, 16", shown)]
    ratio = float(re.search(r"ratio (\d\.\d+): -?\d+\.\d s more", shown)[1])
    assert len(speeds) == 2 and abs(ratio - speeds[1] / speeds[0]) < 0.05
    assert 16 / speeds[1] >= 2 * 0.5 - 0.05  # two batches, one deadline each; rounding is below 0.05 s
    assert "timeout: 16" in shown


def test_names_a_wrong_argument(capsys):
    assert rewards.main(["size=3"]) == 2
    assert "size=3" in capsys.readouterr().err
