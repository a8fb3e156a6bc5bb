"""Fixtures that run the evaluation command on the smallest model, with real or fake images."""

import json

import pytest
from PIL import Image

from vargpt_rl.evaluate import evaluated_model
from vargpt_rl.evaluate.__main__ import main
from vargpt_rl.inference import images


@pytest.fixture
def command(checkpoint, tmp_path):
    """Run the command on the smallest model, at 64 px by default; return the exit code."""

    def run(*arguments):
        defaults = [f"checkpoint={checkpoint}", f"out={tmp_path / 'out'}", "resolution=64", "cfg=1", "device=cpu"]
        given = {argument.partition("=")[0] for argument in arguments}
        if "checkpoints" in given:
            given.add("checkpoint")
        return main([*(a for a in defaults if a.partition("=")[0] not in given), *arguments])

    return run


@pytest.fixture
def painted(monkeypatch):
    """Replace the model's images by images of one colour, which follows from the seed; return the generated lines."""
    drawn = []

    def paint(model, chat, lines, look):
        drawn.extend(lines)
        return [Image.new("RGB", tuple(line["size"][::-1]), colour(line["seed"])) for line in lines]

    monkeypatch.setattr(images, "draw_batch", paint)
    monkeypatch.setattr(evaluated_model, "load", lambda *_: (None, None))
    return drawn


def colour(seed: int) -> tuple[int, int, int]:
    return seed % 256, seed // 256 % 256, seed // 65536 % 256


@pytest.fixture
def result(tmp_path):
    """Read the first measured row of a benchmark's JSON file."""

    def read(benchmark: str) -> dict:
        return json.loads((tmp_path / f"out/{benchmark}.json").read_text())["measured"][0]

    return read


@pytest.fixture
def folder(tmp_path):
    """Find the folder of a benchmark's only checkpoint."""

    def find(benchmark: str):
        (found,) = (path for path in (tmp_path / "out" / benchmark).iterdir() if path.is_dir())
        return found

    return find
