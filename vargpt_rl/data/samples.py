"""What travels between the rooms: records, prompts, samples, winners."""

from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class Prompt:
    """A drawing request: ``text`` is what the user says, ``reply`` what the model says before the image.

    An edit also shows an image: ``shown`` is its key, loaded at ``shown_side`` pixels a side.
    """

    id: str
    text: str
    reply: str = ""
    shown: str | None = None
    shown_side: int = 0


@dataclass(frozen=True)
class Record:
    """A training image with its prompt. ``image`` is a key that its data source can load."""

    id: str
    prompt: Prompt
    image: str


class ImageQuestion(NamedTuple):
    """A question about the image of key ``image``, and its right answer."""

    image: str
    question: str
    answer: str


class ImageEdit(NamedTuple):
    """An instruction that turns the image of key ``before`` into the one of key ``after``."""

    before: str
    instruction: str
    after: str


@dataclass(frozen=True)
class Sample:
    """An image drawn by a policy. ``bits`` are packed (``vargpt_rl.model.bits.pack``), L tokens at ``resolution``."""

    prompt: Prompt
    bits: bytes
    resolution: int
    seed: int
    sampling: dict[str, float] = field(hash=False)
    version: int
    checkpoint: str


@dataclass(frozen=True)
class Winner:
    """A stronger system's image of a prompt, as packed bits; ``source`` says where it came from."""

    prompt: Prompt
    bits: bytes
    resolution: int
    source: str


@dataclass(frozen=True)
class Probe:
    """One fixed image: learner and workers must agree on its log-probability after a swap."""

    prompt: Prompt
    bits: bytes
    resolution: int
