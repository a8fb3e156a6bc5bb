"""What travels between reading captions, wording them, and writing them down."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Caption:
    """A usable caption, in one line; ``file`` is its image's, and ``source`` where it was read."""

    id: str
    text: str
    file: str | None
    source: str


@dataclass(frozen=True)
class Dialogue:
    """What the user and the assistant say; ``made_by`` goes into the output: template ids, or a model's name."""

    prompt: str
    answer: str
    made_by: dict[str, object]


@dataclass(frozen=True)
class Reject:
    """A record without a dialogue. ``id`` is None where there is none to read; ``detail`` is what was found instead."""

    id: str | None
    source: str
    reason: str
    detail: str = ""


class Unusable(Exception):
    """Nothing to be had for one record, for a reason that is counted."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail
