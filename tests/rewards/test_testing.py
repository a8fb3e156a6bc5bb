"""The contract test must find what it promises to find."""

import subprocess
import sys

import pytest

from rewards.testing import check_reward

BREAKS = {
    "one number or None": "lambda images, prompts: ['good'] * len(images)",
    "BROKEN  one number or None for each image: AssertionError: 4 values": "lambda i, p: [1.0] * (len(i) - 1)",
    "an empty list": "lambda images, prompts: [float(len(images)) / len(images)] * len(images)",
    "the same score alone": "lambda images, prompts: [float(len(images))] * len(images)",
    "in the order": "lambda images, prompts: sorted(mean(i) for i in images)",
    "each time": "lambda images, prompts: [random.random() for _ in images]",
    "left as they are": "lambda images, prompts: [i.putpixel((0, 0), (1, 2, 3)) for i in images]",
    "grey, transparent": "lambda images, prompts: [float(i.getpixel((0, 0))[0]) for i in images]",
    "infinite": "lambda images, prompts: [float('inf')] * len(images)",
}
PLUGIN = """
import random
from PIL import ImageStat

def mean(image):
    return sum(ImageStat.Stat(image).mean)

class Brightness:
    def __init__(self, power):
        self.power = power

    def __call__(self, images, prompts):
        return [mean(image.convert("RGB")) ** self.power for image in images]

def particular(images, prompts):
    if any(image.mode != "RGB" for image in images):
        raise ValueError("RGB only")
    return [float("nan") if i else None for i, _ in enumerate(images)]
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [f"broken_{i} = {code}" for i, code in enumerate(BREAKS.values())]
    (tmp_path / "mine.py").write_text(PLUGIN + "\n".join(lines))


@pytest.mark.parametrize("i", range(len(BREAKS)))
def test_a_broken_contract_is_reported(plugin, capsys, i):
    with pytest.raises(AssertionError, match="breaks the contract"):
        check_reward(f"mine.py:broken_{i}")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("BROKEN")]
    assert any(list(BREAKS)[i] in line for line in lines)


def test_a_good_reward_passes_with_skips_named(plugin, capsys):
    check_reward("mine.py:Brightness", power=0.5)
    assert [line[:8] for line in capsys.readouterr().out.splitlines()] == ["ok      "] * 7
    check_reward("mine.py:particular")
    out = capsys.readouterr().out
    assert out.count("skipped") == 4 and "it refuses mode L: RGB only" in out and "it scores none" in out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["mine.py:Brightness", "power=2"], 0, ""),
        (["mine.py:broken_0"], 1, "mine.py:broken_0 breaks the contract"),
        (["mine.py:Brightness"], 2, "error: Brightness(power): missing"),
        (["mine.py:nothing"], 2, "error: plugin 'mine.py:nothing'"),
        ([], 2, "error: expected file.py:name"),
    ],
)
def test_exit_codes(plugin, arguments, code, said):
    done = subprocess.run([sys.executable, "-m", "rewards.testing", *arguments], capture_output=True, text=True)
    assert done.returncode == code and done.stderr.startswith(said)
