"""A reward that never answers, in a module that is quick to import."""

import time


def hang(images: list, prompts: list[str]) -> list[float]:
    """Sleep, for ever."""
    while True:
        time.sleep(60)
