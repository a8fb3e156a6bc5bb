"""A reward that never answers, in a module that imports quickly."""

import time


def hang(images: list, prompts: list[str]) -> list[float]:
    """Sleep forever."""
    while True:
        time.sleep(60)
