"""Layouts of public data sets, mapped to the schema by a function each, which makes a conversation of a row.

A row refers to its images by their names below the folder ``root``, unless it brings them along.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any

from vargpt_rl.common.wording import is_blank
from vargpt_rl.data.quarantine import BadRecord
from vargpt_rl.data.records.formats import Row
from vargpt_rl.data.records.images import ImageRef, InArchive, InRecord, on_disk
from vargpt_rl.data.records.midjourney import ImagineRequest, permutations, split_commands
from vargpt_rl.data.records.schema import DRAWN, SHOWN, Limit, Message, RecordConversation, checked
from vargpt_rl.data.samples import Prompt
from vargpt_rl.data.sources import REPLY, whole_number

SYSTEM = "system"
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": SYSTEM}


@dataclass(frozen=True)
class Import:
    """Step of `vargpt_rl.data.records.reader.Records` that turns rows of a ``layout`` into checked conversations."""

    layout: Callable[[Row, Path], RecordConversation]
    source: str
    root: Path
    limit: Limit = Limit()

    def __call__(self, row: Row) -> RecordConversation:
        return checked(replace(self.layout(row, self.root), source=self.source), self.limit)


def native(row: Row, root: Path) -> RecordConversation:
    """This project's own layout, after figure 15 of the VARGPT paper with ``id`` and ``task`` added.

    ``messages`` [{"role", "content"}], ``images`` [a name, or {"bytes", "path"}, or what a tar's reader found]. A row
    of a tar without ``id`` has its members' common name as one. A system turn comes before the user's first words.
    """
    turns = [(_text(turn, "role"), _text(turn, "content", blank=True)) for turn in _objects(row, "messages")]
    messages = _messages(turns)
    images = tuple(_image(image, root) for image in _of(row, "images", list))
    return RecordConversation(_name(row, "id" if "id" in row else "__key__"), "", _text(row, "task"), messages, images)


def llava(row: Row, root: Path) -> RecordConversation:
    """LLaVA-1.5-665K (JSON, ``image`` a name) and LLaVA-OneVision (Parquet, ``image`` {"bytes", "path"} or null).

    Layout: the data sets' cards, and the training code of LLaVA. ``conversations`` [{"from": "human" | "gpt", "value"}]
    with ``<image>`` in the values. Also, as in LLaVA-NeXT's interleaved data and custom sets: ``image`` or ``images``
    is a list, an image is its encoded bytes, speakers are "user" and "assistant", a turn of "system" comes first.
    """
    turns = [(_text(turn, "from"), _text(turn, "value", blank=True)) for turn in _objects(row, "conversations")]
    if strangers := {speaker for speaker, _ in turns} - set(_SPEAKERS):
        raise BadRecord(f"turn of {min(strangers)!r}, expected human or gpt")
    messages = _messages([(_SPEAKERS[speaker], text) for speaker, text in turns])
    given = row.get("images") or row.get("image") or []
    images = tuple(_image(image, root) for image in (given if isinstance(given, list) else [given]))
    identity = _name(row, "__key__" if "id" not in row and "__key__" in row else "id")
    return RecordConversation(identity, "", "understanding", messages, images)


def _messages(turns: list[tuple[str, str]]) -> tuple[Message, ...]:
    """Return the turns as messages, a system turn at the front of the user's first words: the template has its own."""
    if len(turns) > 1 and turns[0][0] == SYSTEM and turns[1][0] == "user":
        (_, said), (role, text), *rest = turns
        turns = [(role, f"{said}\n\n{text}" if said.strip() else text), *rest]
    return tuple(Message(role, text) for role, text in turns)


def journeydb(row: Row, root: Path) -> RecordConversation:
    """JourneyDB (JSON lines): ``img_path`` "./000/<name>.jpg", ``prompt``, ``Task2`` {"Caption"} where it is labelled.

    Layout: the data set's card and public readers of ``train_anno.jsonl``. The caption is the request; an image
    without one has its prompt, less the Midjourney commands.
    """
    file = _text(row, "img_path")
    labels = row.get("Task2") or {}
    if not isinstance(labels, dict):
        raise BadRecord(f'"Task2" is of type {type(labels).__name__}, expected dict')
    caption = _text(labels, "Caption") if labels.get("Caption") else _without_commands(_text(row, "prompt"))
    return _drawing(PurePosixPath(file).stem, caption, on_disk(root, file))


def _without_commands(prompt: str) -> str:
    try:
        return split_commands(prompt)[0]
    except ValueError as error:
        raise BadRecord(str(error)) from error


def laion(row: Row, root: Path) -> RecordConversation:
    """LAION-COCO-aesthetic (Parquet): ``key``, ``caption``; its images must have been downloaded by their ``url``.

    Layout: public readers of the data set, and that of img2dataset: folders, "<first 5 digits>/<key>.jpg", or tars,
    whose rows bring their image along and may have the caption as ``txt``. Where img2dataset wrote the table,
    ``status`` says whether the image was fetched.
    """
    if row.get("status", "success") != "success":
        raise BadRecord("image was not fetched")
    key = _name(row, "key" if "key" in row else "__key__").zfill(9)
    caption = _text(row, "caption" if row.get("caption") or "txt" not in row else "txt")
    brought = row.get("images") or [f"{key[:5]}/{key}.jpg"]
    if not isinstance(brought, list) or len(brought) > 1:
        raise BadRecord("row brings more than one image")
    image = _image(brought[0], root)
    return _drawing(key, caption.strip(), image)


def midjourney(row: Row) -> list[ImagineRequest]:
    """midjourney-prompts (Parquet): ``prompt``. A step of its own, since prompts without an image are no conversation;
    ``vargpt_rl.data.prompts`` writes them. A prompt with permutations ("a {red, blue} cat") is several.

    Layout: public readers of the data set, which use no other column.
    """
    try:
        prompts = permutations(_text(row, "prompt"))
    except ValueError as error:
        raise BadRecord(str(error)) from error
    return [_request(prompt) for prompt in prompts]


def _request(prompt: str) -> ImagineRequest:
    text, commands = split_commands(prompt)
    if not text:
        raise BadRecord("prompt of nothing but commands")
    identity = blake2b(prompt.encode(errors="surrogatepass"), digest_size=8).hexdigest()
    return ImagineRequest(Prompt(f"midjourney-{identity}", text, REPLY), commands)


def editing(row: Row, root: Path) -> RecordConversation:
    """X2I, StyleBooth within it (JSON lines): ``instruction``, ``input_images`` [names], ``output_image``.

    Layout: OmniGen's documentation, which also writes ``output_images``, and its example file. The instruction names
    its images "<img><|image_1|></img>"; where it names none they come first. Without inputs it is a plain drawing.
    """
    instruction = _text(row, "instruction")
    inputs = [on_disk(root, _string(name, "input_images")) for name in _of(row, "input_images", list)]
    drawn = _text(row, "output_image" if "output_image" in row else "output_images")
    named = [int(number) for number in re.findall(r"<img><\|image_(\d+)\|></img>", instruction)]
    if not named:
        named = list(range(1, len(inputs) + 1))
        instruction = SHOWN * len(inputs) + instruction
    elif set(named) != set(range(1, len(inputs) + 1)):
        raise BadRecord("images named in the instruction are not the input images")
    text = re.sub(r"<img><\|image_\d+\|></img>", SHOWN, instruction)
    images = (*(inputs[number - 1] for number in named), on_disk(root, drawn))
    messages = (Message("user", text), Message("assistant", f"{REPLY}{DRAWN}"))
    return RecordConversation(drawn, "", "editing" if inputs else "generation", messages, images)


def imagenet(row: Row, root: Path, names: dict[str, str]) -> RecordConversation:
    """ImageNet (rows of the "synsets" reader), as the single-round dialogues of the VARGPT paper's stage 1.

    ``names``: see `class_names`. Layout: "<synset>/<image>.JPEG"; dialogue: figure 15 of the paper.
    """
    if row["synset"] not in names:
        raise BadRecord("synset without a name")
    name = names[row["synset"]]
    messages = (
        Message("user", f"Please generate a picture about {name}"),
        Message("assistant", f"The picture of the {name} is as follows: {DRAWN}"),
    )
    return RecordConversation(row["file"], "", "generation", messages, (on_disk(root, row["file"]),))


def class_names(file: Path) -> dict[str, str]:
    """Read the name of each synset, from lines such as "n01440764 tench, Tinca tinca" (``LOC_synset_mapping.txt``)."""
    names = dict(line.partition(" ")[::2] for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    if nameless := [synset for synset, name in names.items() if not name.strip()]:
        raise ValueError(f"{file}: no name for {nameless[0]}")
    return names


def _drawing(identity: str, request: str, image: ImageRef) -> RecordConversation:
    messages = (Message("user", request), Message("assistant", f"{REPLY}{DRAWN}"))
    return RecordConversation(identity, "", "generation", messages, (image,))


def _image(value: object, root: Path) -> ImageRef:
    if isinstance(value, InArchive):
        return value
    if isinstance(value, bytes):
        return InRecord(value)
    if isinstance(value, str):
        return on_disk(root, value)
    if not isinstance(value, dict):
        raise BadRecord(f"image is of type {type(value).__name__}, expected str, bytes or dict")
    if isinstance(value.get("bytes"), bytes):
        return InRecord(value["bytes"])
    return on_disk(root, _text(value, "path"))


def _of(row: Row, name: str, kind: type) -> Any:
    if name not in row:
        raise BadRecord(f'"{name}" is missing')
    if not isinstance(row[name], kind):
        raise BadRecord(f'"{name}" is of type {type(row[name]).__name__}, expected {kind.__name__}')
    return row[name]


def _string(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f'"{name}" has a {type(value).__name__}, expected str')
    return value


def _text(row: Row, name: str, blank: bool = False) -> str:
    text = _of(row, name, str)
    if not blank and is_blank(text):
        raise BadRecord(f'"{name}" is empty')
    return text


def _objects(row: Row, name: str) -> list[Row]:
    items = _of(row, name, list)
    if any(not isinstance(item, dict) for item in items):
        raise BadRecord(f'"{name}" has other items than objects')
    return items


def _name(row: Row, name: str) -> str:
    """Return a text, or a whole number as text: some data sets number their records."""
    number = whole_number(row.get(name))
    return _text(row, name) if number is None else str(number)
