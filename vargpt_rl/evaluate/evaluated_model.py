"""A checkpoint under evaluation: its images and answers so far, and its model, loaded when more are needed."""

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from vargpt_rl.common.bars import progress_bar
from vargpt_rl.data.quarantine import Quarantine
from vargpt_rl.evaluate.settings import EvaluateConfig
from vargpt_rl.inference.conversation import device_and_dtype, load
from vargpt_rl.inference.images import Look, batches, check_unchanged, draw_missing, image_line, make_folder
from vargpt_rl.model.hub import check_model
from vargpt_rl.model.prompt import ChatTemplate
from vargpt_rl.model.unified import Unified
from vargpt_rl.storage.files import digest, write_atomically
from vargpt_rl.storage.lines import as_lines, read_records
from vargpt_rl.text.engine import TextRequest, answers
from vargpt_rl.text.transformers_engine import TransformersEngine


class ImageRequest(NamedTuple):
    """An image to generate. Its seed follows from ``item`` and ``number``; ``image`` names an image to edit."""

    file: str
    prompt: str
    item: int
    number: int = 0
    image: str | None = None


class QuestionRequest(NamedTuple):
    """A question about the image named ``image``; ``key`` identifies the question."""

    key: str
    question: str
    image: str


class EvaluatedModel:
    """The checkpoint ``name``. ``out`` is the folder of its images and answers; ``weights`` is a hash of its files.

    Images and answers are recorded with that hash and all settings, so that results of another model under the same
    name are detected instead of reused.
    """

    def __init__(self, config: EvaluateConfig, name: str):
        self.config = config
        self.name = name
        self.path = Path(check_model(name))
        label = re.sub(r"[^\w.-]", "_", Path(name).name)
        place = hashlib.blake2b(
            str(self.path).encode(), digest_size=4
        ).hexdigest()  # labels of checkpoints may be equal
        self.out = make_folder(str(config.folder / f"{label}-{place}"))
        self.dtype = str(device_and_dtype(config.device, config.dtype)[1]).removeprefix("torch.")
        self.weights = model_digest(self.path)

    @cached_property
    def _loaded(self) -> tuple[Unified, ChatTemplate]:
        return load(self.path, self.config.device, self.config.dtype)

    def release(self) -> None:
        """Free the model's memory."""
        self.__dict__.pop("_loaded", None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def draw(self, requests: Sequence[ImageRequest], look: Look | None = None, records: str = "images") -> None:
        """Generate the images missing from ``out``, or this process's part of them. ValueError if settings changed.

        ``records`` names the file of records; it begins with "images". Each kind of images has its own file.
        """
        config = self.config
        lines = [image_line(config, *request) | {"weights": self.weights, "dtype": self.dtype} for request in requests]
        draw_missing(lines, self.out, lambda: self._loaded, config.batch_size, look, config.part, config.own(records))

    def paths(self, requests: Sequence[ImageRequest]) -> list[Path]:
        """Return the paths of the images. ValueError if one is missing."""
        paths = [self.out / request.file for request in requests]
        for path in paths:
            if not path.exists():
                raise ValueError(f"{path}: no such image, expected all parts to be generated before scoring")
        return paths

    def answer(
        self, requests: Sequence[QuestionRequest], look: Look, max_tokens: int, quarantine: Quarantine | None = None
    ) -> dict[str, str]:
        """Return the answers by question key: recorded ones, and this process's part of the missing ones.

        A question whose image cannot be read is quarantined and has no answer.
        """
        lines = [
            {**request._asdict(), "max_tokens": max_tokens, "weights": self.weights, "dtype": self.dtype}
            for request in requests
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
        with (
            path.open("a", encoding="utf-8") as file,
            progress_bar(name=self.out.name, total=len(missing), unit="question") as bar,
        ):
            for batch in batches(missing, self.config.batch_size):
                shown = self._shown(batch, look, quarantine)
                questions = [TextRequest(line["question"], [image]) for line, image in shown]
                texts = answers(TransformersEngine(*self._loaded), questions, max_tokens) if questions else []
                new = [line | {"answer": text} for (line, _), text in zip(shown, texts, strict=True)]
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


def model_digest(folder: Path) -> str:
    """Hash a model directory's weights, settings and tokenizer."""
    total = hashlib.blake2b(digest_size=8)
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".jinja", ".txt")):
        total.update(f"{path.name} {digest(path)}\n".encode())
    return total.hexdigest()
