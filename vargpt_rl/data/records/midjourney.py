"""Midjourney prompts, separated from their commands such as ``--ar 16:9``.

Source of the commands and their short names: Midjourney's parameter list and public guides to it.
"""

from collections import deque
from dataclasses import dataclass
from re import fullmatch

from vargpt_rl.data.samples import Prompt

_NUMBER = r"-?\d*\.?\d+"
_ANYTHING = r"\S+"
_VALUES = {
    "ar": rf"{_NUMBER}:{_NUMBER}",
    "chaos": _NUMBER,
    "cref": _ANYTHING,
    "cw": _NUMBER,
    "h": _NUMBER,
    "iw": _NUMBER,
    "niji": _NUMBER,
    "quality": _NUMBER,
    "repeat": _NUMBER,
    "sameseed": _NUMBER,
    "seed": _NUMBER,
    "sref": _ANYTHING,
    "stop": _NUMBER,
    "style": r"[A-Za-z0-9-]+",
    "stylize": _NUMBER,
    "sw": _NUMBER,
    "v": _NUMBER,
    "w": _NUMBER,
    "weird": _NUMBER,
}
_FLAGS = {"beta", "creative", "fast", "hd", "relax", "test", "testp", "tile", "turbo", "upbeta", "uplight", "video"}
_SHORT = {
    "aspect": "ar",
    "c": "chaos",
    "q": "quality",
    "r": "repeat",
    "s": "stylize",
    "version": "v",
}
_DASHES = ("--", "\u2014", "\u2013")  # phones turn two hyphens into a dash


@dataclass(frozen=True)
class ImagineRequest:
    """A prompt and its commands: the value of each under its name, "" where it has none."""

    prompt: Prompt
    commands: dict[str, str]


def split_commands(prompt: str) -> tuple[str, dict[str, str]]:
    """Split ``prompt`` into its words without commands, joined by blanks, and its commands.

    ``no`` takes all words up to the next command. Others take the next word if it has the form of their value, a comma
    behind it aside. What looks like a command but is unknown stays text. Of equal commands the last one counts.
    """
    words, text, commands = deque(prompt.split()), [], {}
    while words:
        word = words.popleft()
        name = _command(word)
        if name is None:
            text.append(word)
        elif name == "no":
            unwanted = []
            while words and _command(words[0]) is None:
                unwanted.append(words.popleft())
            commands[name] = " ".join(unwanted)
        elif words and name in _VALUES and fullmatch(_VALUES[name], words[0].rstrip(",;")):
            commands[name] = words.popleft().rstrip(",;")
        else:
            commands[name] = ""
    return " ".join(text), commands


def _command(word: str) -> str | None:
    """Return the full name of the command ``word``, or None if it is no command."""
    dash = next((dash for dash in _DASHES if word.startswith(dash)), None)
    if dash is None:
        return None
    name = word.removeprefix(dash).rstrip(",;").lower()
    name = _SHORT.get(name, name)
    return name if name in _VALUES or name in _FLAGS or name == "no" else None
