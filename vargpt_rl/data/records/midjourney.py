"""Midjourney prompts, separated from commands such as ``--ar 16:9`` and from marks of the place they were copied from.

Source of the commands and their short names: Midjourney's parameter list (up to version 8) and public guides to it.
"""

import re
from collections import deque
from dataclasses import dataclass
from re import fullmatch

from vargpt_rl.data.samples import Prompt

_NUMBER = r"[-+]?\d*\.?\d+"
_AMOUNT = rf"(?:{_NUMBER}|\d{{1,3}}(?:,\d{{3}})+)%?"
_WEIGHT = rf"(?:::{_NUMBER})?"
_ADDRESS = r"[<(\[\"'“]*(?i:(?:https?|ftp)://|s\.mj\.run/|(?:cdn|media)\.(?:discordapp|midjourney)\.(?:com|net)/)\S+"
_REFERENCE = r"\S+"
_VALUES = {
    "ar": rf"{_NUMBER}[:\uff1a/xX]{_NUMBER}",
    "bs": _AMOUNT,
    "chaos": _AMOUNT,
    "cref": _REFERENCE,
    "cw": _AMOUNT,
    "dref": _REFERENCE,
    "dw": _AMOUNT,
    "end": rf"{_ADDRESS}|loop",
    "exp": _AMOUNT,
    "h": _AMOUNT,
    "iw": _AMOUNT,
    "motion": "low|high",
    "niji": _AMOUNT,
    "oref": _REFERENCE,
    "ow": _AMOUNT,
    "p": rf"(?:(?=\S*\d)[\w-]+|[a-z]{{7}}){_WEIGHT}",
    "quality": _AMOUNT,
    "repeat": _AMOUNT,
    "sameseed": _AMOUNT,
    "seed": _AMOUNT,
    "sref": _REFERENCE,
    "stop": _AMOUNT,
    "style": r"[A-Za-z0-9-]+",
    "stylize": _AMOUNT,
    "sv": _AMOUNT,
    "sw": _AMOUNT,
    "v": rf"{_NUMBER}|niji",
    "w": _AMOUNT,
    "weird": _AMOUNT,
}
"""Commands that take a value, with its form."""
_FURTHER = {
    "cref": _ADDRESS,
    "oref": _ADDRESS,
    "p": _VALUES["p"],
    "sref": rf"({_ADDRESS}|\d+|random){_WEIGHT}",
}
"""Form of each further value of commands that take several."""
_FLAGS = {
    "beta", "creative", "draft", "fast", "hd", "hq", "loop", "newclip", "nostretch", "public", "raw", "relax", "sd",
    "stealth", "test", "testp", "tile", "turbo", "upanime", "upbeta", "uplight", "video",
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
_DASHES = re.compile("[-\u2010-\u2015\u2212\uff0d]{2,}|[\u2012-\u2015]")
"""What two hyphens become on phones, in word processors and in East Asian keyboards' wide letters."""
_NAME = re.compile(r"([a-z]+)([=:\uff1a]?)(.*)", re.DOTALL)
_CLOSING = ".,;)]}\"'\u201d\u2019`"
"""Letters that may follow a value and are no part of it."""
_INVISIBLE = re.compile("[\u200b\u2060\ufeff]")
_QUOTED = re.compile(r"\s*\*\*(?P<prompt>.+?)\*\*\s*([-\u2013\u2014]\s.*)?", re.DOTALL)
"""A message of Midjourney's on Discord: "**prompt** - <@user> (fast)"."""
_ASKED = r"/imagine\b\s*(?:prompt\b\s*[:\uff1a]?)?|imagine prompt\s*[:\uff1a]"
_IMAGINE = re.compile(rf"(?P<code>`*) ?(?:(?:{_ASKED})\s*)+", re.IGNORECASE)
_PART_END = re.compile(rf"(?:::|\uff1a\uff1a)({_NUMBER})?")
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
    behind it aside; a value may also be joined to the name (``--v6``, ``--ar=3:2``), and a command to the word before
    it (``8k,--ar 3:2``), where that cannot be a dash between words. What looks like a command but is unknown stays
    text. Of equal commands the last one counts. Addresses of images are the command ``image``. Weights (``::2``) are
    dropped; a part of negative weight goes to ``no``, since that is how Midjourney reads it. "/imagine" and the marks
    of a Discord message are removed. ValueError for a prompt that is too long.
    """
    if len(prompt) > LONGEST_PROMPT:
        raise ValueError(f"prompt of more than {LONGEST_PROMPT} characters")
    prompt = " ".join(_INVISIBLE.sub("", prompt).split())
    quoted = _QUOTED.fullmatch(prompt)
    text = quoted["prompt"] if quoted else prompt
    if asked := _IMAGINE.match(text):
        text = text[asked.end() :].rstrip("`" if asked["code"] else "")
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
    words, text, commands = deque(_words(prompt)), [], {}
    images: list[str] = []
    while words:
        word = words.popleft()
        if (found := _command(word)) is None:
            (images if fullmatch(_ADDRESS, word) else text).append(word)
            continue
        name, value = found
        if name == "no":
            unwanted = []
            while words and _command(words[0]) is None:
                unwanted.append(words.popleft())
            commands[name] = " ".join(unwanted)
        else:
            commands[name] = " ".join(map(_plain_address, [value] if value else _values(name, words)))
    if images:
        commands["image"] = " ".join(map(_plain_address, images))
    return " ".join(text), commands


def _words(prompt: str) -> list[str]:
    """Return the words of a prompt, commands apart from words that they are joined to."""
    words = prompt.split()
    found = []
    for at, word in enumerate(words):
        begin = 0
        for dashes in [] if fullmatch(_ADDRESS, word) else _DASHES.finditer(word):
            command = _command(word[dashes.start() :])
            if dashes.start() == begin or command is None:
                continue
            before = word[dashes.start() - 1]
            numbered = bool(command[1]) or fullmatch(
                _AMOUNT + r"(?::\S+)?", (words[at + 1 :] or [""])[0].rstrip(_CLOSING)
            )
            ends = not before.isalpha() if len(dashes[0]) > 1 else not before.isalnum()
            if ends or (command[0] in _VALUES and numbered):
                found.append(word[begin : dashes.start()])
                begin = dashes.start()
        found.append(word[begin:])
    return found


def _plain_address(word: str) -> str:
    """Return an address without brackets, quotes and what follows it; any other word as it is."""
    return re.sub(r"[<>()\[\]\"'\u201c\u201d]", "", word).rstrip(",.;") if fullmatch(_ADDRESS, word) else word


def _values(name: str, words: deque[str]) -> list[str]:
    """Remove the values of the command ``name`` from the front of ``words`` and return them."""
    found: list[str] = []
    form = _VALUES.get(name)
    while form and words and _command(words[0]) is None and fullmatch(form, words[0].rstrip(_CLOSING)):
        found.append(words.popleft().rstrip(_CLOSING))
        form = _FURTHER.get(name)
    return found


def _without_weights(text: str) -> tuple[str, list[str]]:
    """Return ``text`` without weights, and the parts of negative weight, which it leaves out."""
    pieces = _PART_END.split(text)
    weights = [float(weight or 1) for weight in pieces[1::2]]
    parts = [" ".join(part.split()) for part in pieces[::2]]
    weighted = [part for part in zip(parts, [*weights, 1.0], strict=True) if part[0]]
    return " ".join(part for part, weight in weighted if weight >= 0), [p for p, weight in weighted if weight < 0]


def _command(word: str) -> tuple[str, str] | None:
    """Return the full name of the command ``word`` and the value joined to it, or None if it is no command."""
    dashes = _DASHES.match(word)
    named = _NAME.fullmatch(word[dashes.end() :].rstrip(",;").lower()) if dashes else None
    if named is None:
        return None
    name = _SHORT.get(named[1], named[1])
    if name not in _VALUES and name not in _FLAGS and name != "no":
        return None
    value = named[3].rstrip(_CLOSING)
    if not value:
        return name, ""
    numeric = _VALUES.get(name) == _AMOUNT or name in ("ar", "v")
    return (name, value) if numeric and fullmatch(_VALUES[name], value) else None
