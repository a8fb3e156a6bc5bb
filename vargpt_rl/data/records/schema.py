"""The schema of a training record: a conversation between user and assistant with images at placeholders.

In the texts ``<image>`` stands for an image that the user shows and ``<image_gen>`` for one that the assistant draws.
The images of a conversation are listed in the order of these placeholders, over all its turns.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from vargpt_rl.common.wording import NO_TEXT, is_blank
from vargpt_rl.data.quarantine import BadRecord
from vargpt_rl.data.records.images import MAX_PIXELS, ImageRef, load

SHOWN = "<image>"
DRAWN = "<image_gen>"
ROLES = ("user", "assistant")
TASKS = {"understanding": set(), "generation": {DRAWN}, "editing": {SHOWN, DRAWN}}
"""The placeholders that a task needs. ``understanding`` may do without an image."""


@dataclass(frozen=True)
class Message:
    """A turn. ``role`` is "user" or "assistant"."""

    role: str
    text: str


@dataclass(frozen=True)
class RecordConversation:
    """``source`` names the data set, ``id`` the record in it."""

    id: str
    source: str
    task: str
    messages: tuple[Message, ...]
    images: tuple[ImageRef, ...] = ()


@dataclass(frozen=True)
class Limit:
    """Longest conversation, over all its texts, as ``measure`` counts them."""

    longest: int = 32_768
    unit: str = "characters"
    measure: Callable[[str], int] = len


def pieces(text: str) -> list[str]:
    """Split ``text`` at its placeholders, which become pieces of their own; no piece is empty."""
    return [piece for piece in re.split(f"({SHOWN}|{DRAWN})", text) if piece]


def placeholders(text: str) -> list[str]:
    """Return the placeholders of images in a text, in order."""
    return [piece for piece in pieces(text) if piece in (SHOWN, DRAWN)]


def problem(record: RecordConversation, limit: Limit) -> str | None:
    """Return why ``record`` cannot be trained on, or None if it can."""
    return _wrong_type(record) or _wrong_turns(record) or _wrong_images(record) or _too_long(record, limit)


def checked(record: RecordConversation, limit: Limit) -> RecordConversation:
    """Return ``record``. Raises BadRecord with the reason if it cannot be trained on."""
    if reason := problem(record, limit):
        raise BadRecord(reason)
    return record


def loaded(record: RecordConversation, max_pixels: int = MAX_PIXELS) -> tuple[RecordConversation, list[Image.Image]]:
    """Return ``record`` and its decoded images. Raises BadRecord if one is unreadable."""
    return record, [load(image, max_pixels) for image in record.images]


def _wrong_type(record: RecordConversation) -> str | None:
    texts = {"id": record.id, "source": record.source, "task": record.task}
    texts |= {f"text of turn {number}": message.text for number, message in enumerate(record.messages, 1)}
    for name, value in texts.items():
        if not isinstance(value, str):
            return f"{name} is of type {type(value).__name__}, expected str"
        if NO_TEXT.search(value):
            return f"{name} has characters that are no text"
    if is_blank(record.id):
        return "id is empty"
    if record.task not in TASKS:
        return f"unknown task, expected one of {', '.join(TASKS)}"
    strange = [image for image in record.images if not isinstance(image, ImageRef)]
    return f"image is of type {type(strange[0]).__name__}" if strange else None


def _wrong_turns(record: RecordConversation) -> str | None:
    if not record.messages:
        return "no turns"
    if record.messages[0].role != "user":
        return "first turn is not the user's"
    if any(message.role != ROLES[turn % 2] for turn, message in enumerate(record.messages)):
        return "turns do not alternate between user and assistant"
    if record.messages[-1].role != "assistant":
        return "last turn is not the assistant's"
    for message in record.messages:
        if is_blank(message.text):
            return "empty answer" if message.role == "assistant" else "empty question"
    return None


def _wrong_images(record: RecordConversation) -> str | None:
    found = [(message.role, mark) for message in record.messages for mark in placeholders(message.text)]
    if len(found) != len(record.images):
        return "number of placeholders is not the number of images"
    if ("user", DRAWN) in found:
        return f"{DRAWN} in the user's turn"
    if ("assistant", SHOWN) in found:
        return f"{SHOWN} in the assistant's turn"
    marks = {mark for _, mark in found}
    if missing := TASKS[record.task] - marks:
        return f"{record.task} without {' or '.join(sorted(missing))}"
    if (record.task == "understanding" and DRAWN in marks) or (record.task == "generation" and SHOWN in marks):
        return f"{record.task} with {' and '.join(sorted(marks))}"
    return None


def _too_long(record: RecordConversation, limit: Limit) -> str | None:
    length = sum(limit.measure(message.text) for message in record.messages)
    return f"longer than {limit.longest} {limit.unit}" if length > limit.longest else None
