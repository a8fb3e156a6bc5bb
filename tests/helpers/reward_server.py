"""A reward behind HTTP: a real server in its own process."""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

from PIL import Image

from rewards.remote import TOKEN
from vargpt_rl.common.network import free_port

PLUGIN = """
import time

class Reward:
    def __init__(self, factor=1):
        self.factor = factor

    def __call__(self, images, prompts):
        if "slow" in prompts:
            time.sleep(5)
        if "hang" in prompts:
            time.sleep(10**6)
        if "raise" in prompts:
            raise ValueError("a bad mood")
        if "short" in prompts:
            return []
        special = {"none": None, "nan": float("nan")}
        return [special.get(p, self.factor * float(i.getpixel((0, 0))[0])) for i, p in zip(images, prompts)]
"""


@contextlib.contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address and the process of a running server that asks for a token."""
    (folder / "mine.py").write_text(PLUGIN)
    port = free_port()
    command = [sys.executable, "-m", "rewards.serve", "path=mine.py:Reward", f"port={port}", *arguments]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=os.environ | {TOKEN: "secret"}, stderr=log, stdout=log)
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 200
    while True:
        try:
            assert json.load(urllib.request.urlopen(f"{address}/health")) == {"status": "ok"}
            break
        except URLError:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
    try:
        yield f"{address}/score", process
    finally:
        process.terminate()
        process.wait(15)
    assert "secret" not in (folder / "log").read_text()


def reds(*values: int) -> list[Image.Image]:
    return [Image.new("RGB", (4, 4), (value, 0, 0)) for value in values]
