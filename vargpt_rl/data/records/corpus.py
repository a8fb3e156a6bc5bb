"""Conversations about the images of a data source, which are loaded by key: the records of shapes and captions."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from vargpt_rl.data.images import ImageSource
from vargpt_rl.data.records.images import InSource
from vargpt_rl.data.records.reader import ListPart, ReadOptions, Records
from vargpt_rl.data.records.schema import DRAWN, SHOWN, Limit, Message, RecordConversation, checked
from vargpt_rl.data.samples import ImageQuestion, Record


@dataclass(frozen=True)
class Corpus:
    """Conversations held in memory: those of a data source whose images have keys."""

    rows: list[RecordConversation]
    weight: float = 1.0

    @property
    def task(self) -> str:
        """Editing if any row is an edit, else the task of all rows."""
        return "editing" if any(row.task == "editing" for row in self.rows) else self.rows[0].task

    def open(self, name: str, reading: ReadOptions, quarantine: Path, steps: tuple[Callable, ...]) -> Records:
        """Read the conversations, each passed through ``steps``; all of them are shuffled together."""
        reading = replace(reading, block=len(self.rows))
        return Records([ListPart(name, self.rows)], [check_conversation, *steps], quarantine / name, reading)

    def repeated(self, count: int) -> "Corpus":
        """Return the corpus with at least ``count`` rows, so that each of as many readers has one."""
        return replace(self, rows=self.rows * -(-count // len(self.rows)))


def check_conversation(record: RecordConversation) -> RecordConversation:
    """Return ``record``. BadRecord if it cannot be trained on."""
    return checked(record, Limit())


def drawing(record: Record, source: ImageSource, side: int) -> RecordConversation:
    """Make a conversation of a training image, ``side`` pixels a side, and its prompt, which may show an image."""
    prompt = record.prompt
    image = InSource(source, record.image, side)
    answer = Message("assistant", f"{prompt.reply}{DRAWN}")
    if prompt.shown is None:
        return RecordConversation(prompt.id, "", "generation", (Message("user", prompt.text), answer), (image,))
    shown = InSource(source, prompt.shown, prompt.shown_side)
    request = Message("user", f"{SHOWN}{prompt.text}")
    return RecordConversation(prompt.id, "", "editing", (request, answer), (shown, image))


def question(asked: ImageQuestion, source: ImageSource, side: int) -> RecordConversation:
    """Make a conversation of a question about an image, shown ``side`` pixels wide and high."""
    messages = (Message("user", f"{SHOWN}{asked.question}"), Message("assistant", asked.answer))
    return RecordConversation(asked.image, "", "understanding", messages, (InSource(source, asked.image, side),))
