"""A checkpoint under evaluation: what it has drawn and answered, and its model where there is more to do."""

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from vargpt_rl.data.quarantine import Quarantine
from vargpt_rl.evaluate.settings import EvaluateConfig
from vargpt_rl.inference.answer import answer
from vargpt_rl.inference.conversation import device_and_dtype, load
from vargpt_rl.inference.images import batches, check_unchanged, draw_missing, image_line, make_folder
from vargpt_rl.model.hub import check_model
from vargpt_rl.model.prompt import ChatTemplate
from vargpt_rl.model.unified import Unified
from vargpt_rl.storage.files import write_atomically
from vargpt_rl.storage.lines import as_lines, read_records

Look = Callable[[str], Image.Image]
"""The image that a name stands for; ValueError where it cannot be read."""


class ImageRequest(NamedTuple):
    """An image to be drawn: its seed follows from the numbers ``index`` and ``number``, ``image`` is to be edited."""

    file: str
    prompt: str
    index: int
    number: int = 0
    image: str | None = None


class QuestionRequest(NamedTuple):
    """A question about the image that ``image`` names; ``key`` is the question's own name."""

    key: str
    question: str
    image: str


class EvaluatedModel:
    """The checkpoint ``name``. ``out`` has all that is made with it; ``weights`` is a hash of its files.

    Images and answers are recorded with that hash and with all settings, so that those of another model in the same
    place are noticed and not taken for this one's.
    """

    def __init__(self, config: EvaluateConfig, name: str):
        self.config, self.name = config, name
        self.path = Path(check_model(name))
        label = re.sub(r"[^\w.-]", "_", Path(name).name)  # of several, the paths' last parts may be the same
        place = hashlib.blake2b(str(self.path).encode(), digest_size=4).hexdigest()
        self.out = make_folder(str(config.folder / f"{label}-{place}"))
        self.dtype = str(device_and_dtype(config.device, config.dtype)[1]).removeprefix("torch.")
        self.weights = digest(self.path)

    @cached_property
    def _loaded(self) -> tuple[Unified, ChatTemplate]:
        return load(self.path, self.config.device, self.config.dtype)

    def release(self) -> None:
        """Give the model's memory back."""
        self.__dict__.pop("_loaded", None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def draw(self, wanted: Sequence[ImageRequest], look: Look | None = None, records: str = "images") -> None:
        """Draw what is not in ``out`` yet, or this process's part of it. ValueError where settings have changed.

        ``records`` begins with "images" and names the record, so that different kinds of images have their own.
        """
        lines = [
            image_line(self.config, w.file, w.prompt, w.index, w.number, w.image)
            | {"weights": self.weights, "dtype": self.dtype}
            for w in wanted
        ]
        config = self.config
        draw_missing(lines, self.out, lambda: self._loaded, config.batch_size, look, config.part, config.own(records))

    def paths(self, wanted: Sequence[ImageRequest]) -> list[Path]:
        """Where the images are. ValueError where one is missing."""
        paths = [self.out / w.file for w in wanted]
        for path in paths:
            if not path.exists():
                raise ValueError(f"{path}: no such image")
        return paths

    def answer(
        self, asked: Sequence[QuestionRequest], look: Look, max_tokens: int, quarantine: Quarantine | None = None
    ) -> dict[str, str]:
        """Words to each question by its key, from earlier runs or now; this process's part of the new ones.

        A question whose image cannot be read is put down in ``quarantine`` and has no answer.
        """
        lines = [
            {**question._asdict(), "max_tokens": max_tokens, "weights": self.weights, "dtype": self.dtype}
            for question in asked
        ]
        found = {line["key"]: line for path in sorted(self.out.glob("answers*.jsonl")) for line in read_records(path)}
        for line in lines:
            check_unchanged(self.out, line["key"], line, found.get(line["key"], line))
        missing = [line for line in lines[self.config.part] if line["key"] not in found]
        if missing:
            found |= self._answer_missing(missing, look, max_tokens, quarantine)
        return {line["key"]: found[line["key"]]["answer"] for line in lines if line["key"] in found}

    def _answer_missing(
        self, missing: list[dict], look: Look, max_tokens: int, quarantine: Quarantine | None
    ) -> dict[str, dict]:
        path = self.out / self.config.own("answers")
        write_atomically(path, as_lines(read_records(path)).encode())
        answered = {}
        with path.open("a", encoding="utf-8") as file, tqdm(total=len(missing), unit="question") as bar:
            for batch in batches(missing, self.config.batch_size):
                shown = self._shown(batch, look, quarantine)
                questions = [(line["question"], [image]) for line, image in shown]
                words = answer(*self._loaded, questions, max_tokens) if questions else []
                new = [line | {"answer": said} for (line, _), said in zip(shown, words, strict=True)]
                answered |= {line["key"]: line for line in new}
                file.write(as_lines(new))
                file.flush()
                bar.update(len(batch))
        return answered

    def _shown(self, batch: list[dict], look: Look, quarantine: Quarantine | None) -> list[tuple[dict, Image.Image]]:
        shown = []
        for line in batch:
            try:
                shown.append((line, look(line["image"])))
            except ValueError as fault:
                if quarantine is None:
                    raise
                quarantine.add(line["key"], line["image"], str(fault))
        return shown


def digest(folder: Path) -> str:
    """A hash of a model directory's weights, settings and tokenizer."""
    whole = hashlib.blake2b(digest_size=8)
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".jinja", ".txt")):
        with path.open("rb") as file:
            own = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        whole.update(f"{path.name} {own}\n".encode())
    return whole.hexdigest()
