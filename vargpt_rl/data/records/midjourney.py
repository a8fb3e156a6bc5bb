"""Midjourney prompts, separated from commands such as ``--ar 16:9`` and from marks of the place they were copied from.

Source of the commands and their short names: Midjourney's parameter list (up to version 7) and public guides to it.
"""

import re
from collections import deque
from dataclasses import dataclass
from re import fullmatch

from vargpt_rl.data.samples import Prompt

_NUMBER = r"-?\d*\.?\d+"
_WEIGHT = rf"(?:::{_NUMBER})?"
_ADDRESS = r"<?https?://\S+"
_REFERENCE = r"\S+"
_VALUES = {
    "ar": rf"{_NUMBER}:{_NUMBER}",
    "bs": _NUMBER,
    "chaos": _NUMBER,
    "cref": _REFERENCE,
    "cw": _NUMBER,
    "dref": _REFERENCE,
    "dw": _NUMBER,
    "end": _ADDRESS,
    "exp": _NUMBER,
    "h": _NUMBER,
    "iw": _NUMBER,
    "motion": "low|high",
    "niji": _NUMBER,
    "oref": _REFERENCE,
    "ow": _NUMBER,
    "p": rf"(?=\S*\d)[\w-]+{_WEIGHT}",
    "quality": _NUMBER,
    "repeat": _NUMBER,
    "sameseed": _NUMBER,
    "seed": _NUMBER,
    "sref": _REFERENCE,
    "stop": _NUMBER,
    "style": r"[A-Za-z0-9-]+",
    "stylize": _NUMBER,
    "sv": _NUMBER,
    "sw": _NUMBER,
    "v": rf"{_NUMBER}|niji",
    "w": _NUMBER,
    "weird": _NUMBER,
}
"""Commands that take a value, with its form."""
_FURTHER = {
    "cref": _ADDRESS,
    "oref": _ADDRESS,
    "p": _VALUES["p"],
    "sref": rf"({_ADDRESS}|\d+){_WEIGHT}",
}
"""Form of each further value of commands that take several."""
_FLAGS = {
    "beta", "creative", "draft", "fast", "hd", "loop", "public", "raw", "relax", "sd", "stealth", "test", "testp",
    "tile", "turbo", "upbeta", "uplight", "video",
}  # fmt: skip
_SHORT = {
    "aspect": "ar",
    "c": "chaos",
    "personalize": "p",
    "profile": "p",
    "q": "quality",
    "r": "repeat",
    "s": "stylize",
    "version": "v",
}
_DASHES = ("--", "\u2014", "\u2013")  # phones turn two hyphens into a dash
_QUOTED = re.compile(r"\s*\*\*(?P<prompt>.+)\*\*\s*(-\s.*)?", re.DOTALL)
"""A message of Midjourney's on Discord: "**prompt** - <@user> (fast)"."""
_IMAGINE = re.compile(r"\s*/imagine\b\s*(prompt:)?", re.IGNORECASE)
_PART_END = re.compile(rf"::({_NUMBER})?")
_BRACES = re.compile(r"\{([^{}]*)\}")
_COMMA = re.compile(r"(?<!\\),")
"""A comma between options; one after a backslash is part of an option."""
MAX_PERMUTATIONS = 40
"""Prompts that Midjourney makes of one."""
LONGEST_PROMPT = 32_768
"""Characters of a prompt, so that its permutations do not fill the memory."""


@dataclass(frozen=True)
class ImagineRequest:
    """A prompt and its commands: the value of each under its name, "" where it has none."""

    prompt: Prompt
    commands: dict[str, str]


def split_commands(prompt: str) -> tuple[str, dict[str, str]]:
    """Split ``prompt`` into its words without commands, joined by blanks, and its commands.

    ``no`` takes all words up to the next command. Others take the next word if it has the form of their value, a comma
    behind it aside. What looks like a command but is unknown stays text. Of equal commands the last one counts.
    Addresses of images are the command ``image``. Weights (``::2``) are dropped; a part of negative weight goes to
    ``no``, since that is how Midjourney reads it. "/imagine" and the marks of a Discord message are removed.
    """
    quoted = _QUOTED.fullmatch(prompt)
    text = _IMAGINE.sub("", quoted["prompt"] if quoted else prompt, count=1)
    commands: dict[str, str] = {}
    while True:  # a weight may have joined a command to the word before it
        words, found = _split_words(text)
        left, unwanted = _without_weights(words)
        commands = found | commands
        if unwanted:
            commands["no"] = ", ".join([part for part in [commands.get("no")] if part] + unwanted)
        if left == text:
            return text, commands
        text = left


def permutations(prompt: str) -> list[str]:
    """Return the prompts that "a {red, blue} cat" stands for. ValueError if there are more than Midjourney makes."""
    if len(prompt) > LONGEST_PROMPT:
        raise ValueError(f"prompt of more than {LONGEST_PROMPT} characters")
    done: dict[str, None] = {}
    unfinished = deque([prompt])
    while unfinished:
        written = unfinished.popleft()
        choice = next((braces for braces in _BRACES.finditer(written) if _COMMA.search(braces[1])), None)
        if choice is None:
            done[written.replace("\\,", ",")] = None
            continue
        options = _COMMA.split(choice[1])
        if len(done) + len(unfinished) + len(options) > MAX_PERMUTATIONS:
            raise ValueError(f"prompt of more than {MAX_PERMUTATIONS} permutations")
        unfinished += [f"{written[: choice.start()]}{o.strip()}{written[choice.end() :]}" for o in options]
    return list(done)


def _split_words(prompt: str) -> tuple[str, dict[str, str]]:
    words, text, commands = deque(prompt.split()), [], {}
    while words:
        word = words.popleft()
        name = _command(word)
        if name is None and fullmatch(_ADDRESS, word):
            commands["image"] = f"{commands.get('image', '')} {word.strip('<>,')}".strip()
        elif name is None:
            text.append(word)
        elif name == "no":
            unwanted = []
            while words and _command(words[0]) is None:
                unwanted.append(words.popleft())
            commands[name] = " ".join(unwanted)
        else:
            commands[name] = " ".join(_values(name, words))
    return " ".join(text), commands


def _values(name: str, words: deque[str]) -> list[str]:
    """Remove the values of the command ``name`` from the front of ``words`` and return them."""
    found: list[str] = []
    form = _VALUES.get(name)
    while form and words and _command(words[0]) is None and fullmatch(form, words[0].rstrip(".,;")):
        found.append(words.popleft().rstrip(".,;"))
        form = _FURTHER.get(name)
    return found


def _without_weights(text: str) -> tuple[str, list[str]]:
    """Return ``text`` without weights, and the parts of negative weight, which it leaves out."""
    pieces = _PART_END.split(text)
    weights = [float(weight or 1) for weight in pieces[1::2]]
    parts = [" ".join(part.split()) for part in pieces[::2]]
    weighted = [part for part in zip(parts, [*weights, 1.0], strict=True) if part[0]]
    return " ".join(part for part, weight in weighted if weight >= 0), [p for p, weight in weighted if weight < 0]


def _command(word: str) -> str | None:
    """Return the full name of the command ``word``, or None if it is no command."""
    dash = next((dash for dash in _DASHES if word.startswith(dash)), None)
    if dash is None:
        return None
    name = word.removeprefix(dash).rstrip(",;").lower()
    name = _SHORT.get(name, name)
    return name if name in _VALUES or name in _FLAGS or name == "no" else None
