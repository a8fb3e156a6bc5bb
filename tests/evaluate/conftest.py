"""The evaluation command on the smallest model, with or without its drawing."""

import json

import pytest
from PIL import Image

from vargpt_rl import generate
from vargpt_rl.evaluate import subject
from vargpt_rl.evaluate.__main__ import main


@pytest.fixture
def command(checkpoint, tmp_path):
    """Runs the command on the smallest model, 64 pixels a side unless told otherwise; its exit code."""

    def run(*arguments):
        defaults = [f"checkpoint={checkpoint}", f"out={tmp_path / 'out'}", "resolution=64", "cfg=1", "device=cpu"]
        given = {argument.partition("=")[0] for argument in arguments}
        if "checkpoints" in given:
            given.add("checkpoint")
        return main([*(a for a in defaults if a.partition("=")[0] not in given), *arguments])

    return run


@pytest.fixture
def painted(monkeypatch):
    """Images of one colour, which follows from their seed, in place of the model's. The lines that were drawn."""
    drawn = []

    def paint(model, chat, lines, look):
        drawn.extend(lines)
        return [Image.new("RGB", tuple(line["size"][::-1]), colour(line["seed"])) for line in lines]

    monkeypatch.setattr(generate, "draw_batch", paint)
    monkeypatch.setattr(subject, "load", lambda *_: (None, None))
    return drawn


def colour(seed: int) -> tuple[int, int, int]:
    return seed % 256, seed // 256 % 256, seed // 65536 % 256


@pytest.fixture
def result(tmp_path):
    """The first measured row of a benchmark's JSON file."""

    def read(benchmark: str) -> dict:
        return json.loads((tmp_path / f"out/{benchmark}.json").read_text())["measured"][0]

    return read


@pytest.fixture
def folder(tmp_path):
    """The folder of the only checkpoint of a benchmark."""

    def find(benchmark: str):
        (found,) = (path for path in (tmp_path / "out" / benchmark).iterdir() if path.is_dir())
        return found

    return find
