"""The files in examples/ run."""

import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from configs.load import load_config
from rewards.testing import check_reward

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_reward_keeps_the_contract():
    check_reward(f"{EXAMPLES / 'my_reward.py'}:colourful")


@pytest.mark.slow
def test_drawing_and_asking_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["draw_and_ask.py"])
    runpy.run_path(str(EXAMPLES / "draw_and_ask.py"))
    assert (tmp_path / "circle.png").exists()
    assert "red" in capsys.readouterr().out.lower()


def test_the_script_has_settings_that_exist():
    command = (EXAMPLES / "captioned.sh").read_text().partition("exec ")[2].replace("\\\n", " ")
    words = [word for word in shlex.split(command) if "=" in word]
    assert load_config(words).data.kind == "captioned"


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == {
        "captioned.sh",
        "draw_and_align.ipynb",
        "draw_and_ask.py",
        "my_reward.py",
    }


def test_the_citation_has_the_version_of_the_package():
    citation = yaml.safe_load((EXAMPLES.parent / "CITATION.cff").read_text())
    project = (EXAMPLES.parent / "pyproject.toml").read_text()
    assert f'version = "{citation["version"]}"' in project
