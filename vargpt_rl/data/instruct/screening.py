"""Screening of a language model's replies.

A dialogue is kept if both texts pass every check of `fault`. The checks are made for English. What a caption itself
has (brackets, emoji, other scripts) is allowed in the texts as well.
"""

import json
import re
import unicodedata

from vargpt_rl.data.instruct.banks import bank
from vargpt_rl.data.instruct.dialogue import Unusable

FEWEST_WORDS, MOST_WORDS = 3, 60
LEAST_KEPT = 0.5  # of a caption's content words, in each of the two texts; rewording costs some
REFUSAL = re.compile(
    r"\b(I (cannot|can't|can not) (?!wait)|I('m| am) (sorry|unable|not able)|I (won't|will not)"
    r"|as an? (AI|language model)|unfortunately)\b",
    re.IGNORECASE,
)
PLACEHOLDERS = re.compile(
    r"[\[\]{}<>]|\.\.\.|…|__|\b(caption|placeholder|prompt_seed|answer_seed|caption_seed|lorem ipsum|TODO)\b",
    re.IGNORECASE,
)


def parse(reply: str) -> tuple[str, str]:
    """Return prompt and answer, each in one line, from a reply with JSON, with or without text around it."""
    found = re.search(r"\{.*\}", reply.rpartition("</think>")[2], re.DOTALL)
    try:
        texts = json.loads(found[0]) if found else None
    except (ValueError, RecursionError):
        texts = None
    if texts is None:
        raise Unusable("refusal" if REFUSAL.search(reply.replace("’", "'")) else "reply is not JSON", reply)
    pair = [texts.get(side) for side in ("prompt", "answer")]
    if not all(isinstance(text, str) and text.strip() for text in pair):
        raise Unusable("reply without prompt or answer", reply)
    prompt, answer = (" ".join(text.replace("’", "'").split()) for text in pair)
    return prompt, answer


def fault(prompt: str, answer: str, caption: str, seeds: tuple[str, ...]) -> str | None:
    """Return why a dialogue is not usable, or None."""
    for text in (prompt, answer):
        if REFUSAL.search(text) and not REFUSAL.search(caption):
            return "refusal"
        if any(_words(text) == _words(seed) or seed.lower() in text.lower() for seed in seeds):
            return "repeats a seed"
        if any(match[0].lower() not in caption.lower() for match in PLACEHOLDERS.finditer(text)):
            return "placeholder"
        if any(character not in caption and not _is_latin(character) for character in text):
            return "wrong characters"
        if set(bank("llm")["english_words"]).isdisjoint(_words(text)):
            return "not English"
        if len(_words(text)) < FEWEST_WORDS:
            return "too short"
        if len(_words(text)) > max(MOST_WORDS, 2 * len(_words(caption))):
            return "too long"
        if kept(caption, text) < LEAST_KEPT:
            return "caption content lost"
    return "answer repeats the prompt" if _words(prompt) == _words(answer) else None


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _is_latin(character: str) -> bool:
    """Return whether a character may be in Latin-script text: letter, mark, number, sign, space, but no emoji."""
    kind = unicodedata.category(character)
    if kind.startswith("L"):
        return unicodedata.name(character, "").startswith("LATIN")
    return kind in ("Sm", "Sc", "Sk", "Zs") or kind[0] in "MNP"


def kept(caption: str, text: str) -> float:
    """Return the share of a caption's content words in a text, in any inflection; 1 if the caption has none."""
    empty = {*bank("llm")["english_words"], *bank("llm")["function_words"]}
    words = {word for word in _words(caption) if word not in empty and (len(word) > 2 or word.isdigit())}
    found = _words(text)
    # The beginning of a word, without what "running", "boxes" or "happily" have beyond "run", "box" or "happy".
    has = [any(other.startswith(word[: max(3, len(word) - 4)]) for other in found) for word in words]
    return sum(has) / len(words) if words else 1.0
