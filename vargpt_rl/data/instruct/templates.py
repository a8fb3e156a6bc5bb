"""Dialogues by template: a prompt pattern and an answer pattern, sampled by (seed, id) and filled with the caption.

The paper (VARGPT, section 4.2, stage 3) joins up to 400 templates and captions as they are. Here

- captions that are sentences follow their pattern as a sentence of their own: "Please design a drawing of this: A train
  is on the tracks." instead of "... a drawing of A train is on the tracks.";
- a caption that names a kind of image is not made the subject of another: "Please design an oil painting of a cat.";
- the answer names the same kind of image as the prompt; in the paper they are sampled separately, so a photo may
  answer a request for a painting.

As in the paper, the kind of image is sampled, not read off the image.
"""

import re
from functools import cache
from random import Random
from typing import NamedTuple

from vargpt_rl.data.instruct.banks import bank
from vargpt_rl.data.instruct.dialogue import Caption, Dialogue

VOWEL = re.compile(r"(?i)(?!uni[cfoqstv]|us[eu]|eu|uk|uto|ubi|one\b|once\b)[aeiou]|hour|honest|heir|8|11\b|18\b")
CLOSED = re.compile(r"""[.!?…]["'”’)\]]*$""")  # a text with its last full stop


class Wording(NamedTuple):
    """Parts that fill a pattern; ``sentence``, if not empty, follows the filled pattern."""

    a_picture: str
    the_picture: str
    subject: str
    sentence: str


def template_pair(caption: Caption, seed: int) -> Dialogue:
    """Make the dialogue of a caption. It depends on its id and ``seed`` only, not on other captions."""
    rng = Random(f"{seed} {caption.id}")
    prompts, answers, media = (bank("templates")[part] for part in ("prompts", "answers", "media"))
    prompt, answer, medium = (rng.choice(list(part)) for part in (prompts, answers, media))
    wording = word(caption.text, medium)
    return Dialogue(
        prompt=fill(prompts[prompt], wording),
        answer=fill(answers[answer], wording),
        made_by={"template": {"prompt": prompt, "answer": answer, "medium": medium}},
    )


def word(caption: str, medium: str) -> Wording:
    """Word a caption, and its image as a ``medium`` such as "sketch", for patterns."""
    if is_sentence(caption):
        return _of(medium, "this", _as_sentence(caption))
    phrase = _as_phrase(caption)
    kind = _kind_pattern().match(phrase)
    if not kind:
        return _of(medium, phrase, "")
    picture = phrase.removeprefix(kind["article"] or "")
    a_picture = phrase if kind["article"] else with_article(picture)
    return Wording(a_picture, f"the {picture}", a_picture, "")


def _of(medium: str, subject: str, sentence: str) -> Wording:
    return Wording(f"{with_article(medium)} of {subject}", f"the {medium} of {subject}", subject, sentence)


def fill(pattern: str, wording: Wording) -> str:
    """Fill a pattern; the result ends in one mark."""
    text = pattern.format(**wording._asdict())
    text = text[0].upper() + text[1:]
    if not wording.sentence:
        return text
    return f"{text[:-1]}: {wording.sentence}" if text.endswith(".") else f"{text} {wording.sentence}"


def is_sentence(caption: str) -> bool:
    """Return whether a caption cannot replace a noun: it has a verb, several sentences, or a mark that must stay."""
    words = re.findall(r"[\w']+", caption.lower().replace("’", "'"))
    return (
        words[0] in bank("templates")["sentence_openers"]
        or not set(words).isdisjoint(bank("templates")["finite_verbs"])
        or re.search(r"""[.!?…:;]["'”’)\]]*(\s|$)""", caption.strip(" ,;:").removesuffix(".")) is not None
    )


def _as_phrase(caption: str) -> str:
    """Format a caption for the middle of a sentence: no final mark, no capital that only marks a beginning."""
    phrase = caption.strip(" ,;:").rstrip(" ,;:.")
    first = phrase.split()[0].lower()
    lowered = any(first in bank("templates")[words] for words in ("lowered", "kinds", "kind_openers"))
    return phrase[0].lower() + phrase[1:] if lowered else phrase


def _as_sentence(caption: str) -> str:
    sentence = caption.strip(" ,;:")
    if sentence.split()[0].islower():
        sentence = sentence[0].upper() + sentence[1:]
    return sentence if CLOSED.search(sentence) else f"{sentence}."


def with_article(noun: str) -> str:
    """``noun`` after "a" or "an"."""
    return f"{'an' if VOWEL.match(noun) else 'a'} {noun}"


@cache
def _kind_pattern() -> re.Pattern:
    """Captions that name their kind of image: "a large oil painting of", "photo of", but not "two prints of"."""
    words = bank("templates")
    kinds = "|".join(words["kinds"])
    plain = r"(?:(?!(?:an?|the|of|in|on|with|at|by|and|for|from|to)\b)[\w'-]+ ){0,5}"
    more = r"of|featuring|showing|depicting"
    return re.compile(
        rf"(?P<article>an? ){plain}(?:{kinds})(?= (?:{more}|with|in|by|for|from|on|at)\b|,|$)"
        rf"|(?!(?:{'|'.join(words['lowered'])})\b){plain}(?:{kinds})(?= (?:{more})\b)"
    )
