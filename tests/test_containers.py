"""The recipes of containers, which are not built here: what they copy, install and run exists."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from vargpt_rl.cli.app import make_app

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "container/Dockerfile").read_text()
DEFINITION = (ROOT / "container/vargpt-rl.def").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = {"vargpt_rl", "actors", "learners", "rewards", "configs", "slurm"}


def section(name):
    """Lines of a section of the apptainer definition."""
    text = DEFINITION.partition(f"%{name}\n")[2].partition("\n%")[0]
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def test_what_docker_copies_exists_and_is_everything_that_is_installed():
    copied = [word for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()]
    assert all((ROOT / name).exists() for name in copied)
    assert set(copied) >= PACKAGES and {"pyproject.toml", "requirements.lock", PROJECT["readme"]} <= set(copied)


def test_apptainer_copies_the_same():
    copied = {line.split()[0] for line in section("files")}
    assert all((ROOT / name).exists() for name in copied) and copied >= PACKAGES
    assert all(line.split()[1] == f"/opt/vargpt_rl/{line.split()[0]}" for line in section("files"))


@pytest.mark.parametrize("text", [DOCKERFILE, DEFINITION])
def test_the_python_and_the_extras_are_those_of_the_project(text):
    (minor,) = set(re.findall(r"python:3\.(\d+)-slim", text))
    low, high = re.findall(r"3\.(\d+)", PROJECT["requires-python"])
    assert int(low) <= int(minor) < int(high)
    for extras in re.findall(r'"\.\[([\w,]+)\]"', text):
        assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    assert "--constraint requirements.lock" in text


def test_the_demo_is_what_they_run():
    (command,) = re.findall(r"^CMD (.+)$", DOCKERFILE, re.MULTILINE)
    assert json.loads(command)[0] in get_command(make_app()).commands
    assert 'ENTRYPOINT ["vargpt-rl"]' in DOCKERFILE and "vargpt-rl" in PROJECT["scripts"]
    assert section("runscript")[0].endswith("set -- demo; fi")
