"""Captions, the dialogues made of them, and rejects."""

from dataclasses import dataclass

from vargpt_rl.data.quarantine import BadRecord


@dataclass(frozen=True)
class Caption:
    """A usable caption, in one line; ``file`` is its image's, and ``source`` where it was read."""

    id: str
    text: str
    file: str | None
    source: str


@dataclass(frozen=True)
class Dialogue:
    """The words of user and assistant; ``made_by`` goes into the output: template ids, or a model's name."""

    prompt: str
    answer: str
    made_by: dict[str, object]


@dataclass(frozen=True)
class Reject:
    """A caption without a dialogue. ``id`` is None if there is none to read; ``detail`` is what was found instead."""

    id: str | None
    source: str
    reason: str
    detail: str = ""


class Unusable(BadRecord):
    """A caption that no dialogue can be made of."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason = reason
        self.detail = detail
