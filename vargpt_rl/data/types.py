"""What travels between the rooms: records, prompts, samples, winners."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Prompt:
    """A drawing request: ``text`` is what the user says, ``reply`` what the model says before the picture.

    An edit also shows a picture: ``shown`` is its key, loaded at ``shown_side`` pixels a side.
    """

    id: str
    text: str
    reply: str = ""
    shown: str | None = None
    shown_side: int = 0


@dataclass(frozen=True)
class Record:
    """A training picture with its prompt. ``picture`` is a key that its data source can load."""

    id: str
    prompt: Prompt
    picture: str


@dataclass(frozen=True)
class Sample:
    """A picture drawn by a policy. ``bits`` are packed (``vargpt_rl.model.bits.pack``), L tokens at ``resolution``."""

    prompt: Prompt
    bits: bytes
    resolution: int
    seed: int
    sampling: dict[str, float] = field(hash=False)
    version: int
    checkpoint: str


@dataclass(frozen=True)
class Winner:
    """A stronger system's picture of a prompt, as packed bits; ``source`` says where it came from."""

    prompt: Prompt
    bits: bytes
    resolution: int
    source: str


@dataclass(frozen=True)
class Probe:
    """One fixed picture: learner and workers must agree on its log-probability after a swap."""

    prompt: Prompt
    bits: bytes
    resolution: int
