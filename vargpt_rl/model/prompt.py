"""Chat templates: convert conversations with images to token ids. Includes that of v1.1, which is Qwen2's.

A drawn image is ``image_gen_start``, L x ``image_gen_pad``, ``image_gen_end``; an answer may contain any number of them
(specification, section 3; the published code of v1.1 pads L to a multiple of 128, this model does not).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vargpt_rl.model.configuration import VargptConfig

SYSTEM = "You are a helpful assistant."
REPLY = "Here is the picture."
"""The assistant's words before an image that the user explicitly asked for."""
IGNORED = -100


class EncodedText(NamedTuple):
    """One row: T token ids and the label of each (``IGNORED`` if it is not trained on)."""

    ids: list[int]
    labels: list[int]


class ShownImage(NamedTuple):
    """Placeholder of an image that the user shows, with its number of vision features."""

    features: int


class ImageToDraw(NamedTuple):
    """Placeholder of an image that the assistant draws, with its number of image tokens L."""

    tokens: int


Part = str | ShownImage | ImageToDraw
"""A piece of a turn: words, or the placeholder of an image."""


class VisionInputs(NamedTuple):
    """Understood images, ready for the vision tower."""

    pixel_values: torch.Tensor
    """float: patches [P, 1176] in v1.1, images [images, 3, side, side] in v1."""
    image_grid_thw: torch.Tensor
    """int64 [images, 3]: the grid of patches of each image."""


class ChatTemplate(ABC):
    """Builds rows of token ids from conversations. ``path`` is a directory (or hub name) with tokenizer files.

    A family defines the abstract methods and the tokens below.
    """

    end: int
    """Last token of the assistant's turn."""
    between: list[int]
    """Tokens between two turns."""
    least_side: int
    """Side in pixels of the smallest image that the vision tower takes."""

    def __init__(self, path: str, config: PreTrainedConfig):
        self.config = config
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)

    @abstractmethod
    def system(self) -> list[int]:
        """Return the ids that begin every conversation."""

    @abstractmethod
    def pieces(self, role: str, parts: Iterable[Part]) -> Iterator[tuple[list[int], bool]]:
        """Yield the ids of each piece of a turn, without what follows the turn, and whether they are words."""

    def asked(self, text: str, image_grid_thw: torch.Tensor | None) -> list[Part]:
        """Return the parts of a user's turn, images first."""
        return [*self.shown(image_grid_thw), text]

    @abstractmethod
    def user(self, text: str, image_grid_thw: torch.Tensor | None = None) -> list[int]:
        """Return the ids of a user's turn (images first) and of the opening of the assistant's turn."""

    @abstractmethod
    def seen(self, features: int) -> list[int]:
        """Return the ids of an image that the user shows."""

    @abstractmethod
    def shown(self, image_grid_thw: torch.Tensor | None) -> list[ShownImage]:
        """Return the placeholders of images with these grids."""

    @abstractmethod
    def vision_inputs(self, images: list[Image.Image], max_pixels: int | None = None) -> VisionInputs:
        """Prepare images for the vision tower, limiting each to ``max_pixels`` if that is below the model's limit.

        Raises ValueError for an image that the model cannot take.
        """

    def text(self, text: str) -> list[int]:
        """Tokenize plain text; special tokens written in it stay text."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def content(self, parts: Iterable[Part]) -> Iterator[tuple[list[int], bool]]:
        """Yield the ids of each part, and whether they can be trained on as text."""
        config = self.config
        for part in parts:
            match part:
                case ShownImage(features):
                    yield self.seen(features), False
                case ImageToDraw(tokens):
                    yield [config.image_gen_start_token_id], True
                    yield [config.image_gen_pad_token_id] * tokens, False
                    yield [config.image_gen_end_token_id], True
                case str():
                    yield self.text(part), True

    def encode(self, turns: Iterable[tuple[str, Iterable[Part]]]) -> EncodedText:
        """Encode a whole conversation: the system turn, then the given turns of user and assistant.

        Labelled are the assistant's words, the tokens before and after the images it draws, and the end of its turns.
        """
        ids = self.system()
        labels = [IGNORED] * len(ids)
        for role, parts in turns:
            for piece, is_text in (*self.pieces(role, parts), (self.between, False)):
                ids += piece
                labels += piece if is_text and role == "assistant" else [IGNORED] * len(piece)
        length = len(ids) - len(self.between)  # nothing follows the last turn
        return EncodedText(ids[:length], labels[:length])

    @property
    def closing(self) -> list[int]:
        """Tokens that close the assistant's turn if another follows."""
        return [self.end, *self.between]

    def question(self, text: str, image_grid_thw: torch.Tensor | None = None) -> list[int]:
        """Return the ids of system turn, user turn (images first) and the opening of the assistant's turn."""
        return self.system() + self.user(text, image_grid_thw)

    def replied(self, text: str, reply: Sequence[Part], image_grid_thw: torch.Tensor | None = None) -> EncodedText:
        """Encode one turn of the user (images first) and the assistant's reply."""
        return self.encode([("user", self.asked(text, image_grid_thw)), ("assistant", reply)])

    def answered(self, text: str, answer: str, image_grid_thw: torch.Tensor | None = None) -> EncodedText:
        """Encode a question and its answer in words."""
        return self.replied(text, [answer], image_grid_thw)

    def drawing_prompt(self, text: str, reply: str, image_grid_thw: torch.Tensor | None = None) -> list[int]:
        """Return the ids of a request up to and including ``image_gen_start``, for sampling to continue."""
        return [*self.question(text, image_grid_thw), *self.text(reply), self.config.image_gen_start_token_id]

    def drawn(self, text: str, reply: str, tokens: int, image_grid_thw: torch.Tensor | None = None) -> EncodedText:
        """Encode a request answered by an image of ``tokens`` image tokens."""
        return self.replied(text, [reply, ImageToDraw(tokens)], image_grid_thw)

    def pad(self, rows: list[list[int]], side: str, value: int | None = None, multiple: int = 1) -> torch.Tensor:
        """Pad rows on ``side`` ("left" for sampling, "right" for training) to a common length: int64 [B, T]."""
        value = self.tokenizer.pad_token_id if value is None else value
        width = -(-max(map(len, rows)) // multiple) * multiple
        padded = torch.full((len(rows), width), value)
        for i, row in enumerate(rows):
            at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            padded[i, at] = torch.tensor(row)
        return padded


class ChatFormat(ChatTemplate):
    """Chat template of v1.1, which is Qwen2's."""

    def __init__(self, path: str, config: VargptConfig):
        super().__init__(path, config)
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        self.im_start, self.im_end = self.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        self.end = self.im_end
        self.between = self.text("\n")
        self.least_side = config.vision_config.patch_size * config.vision_config.spatial_merge_size

    def turn(self, role: str, content: list[int]) -> list[int]:
        """Wrap content: ``im_start`` role newline content ``im_end`` newline."""
        return [self.im_start, *self.text(f"{role}\n"), *content, self.im_end, *self.text("\n")]

    def system(self) -> list[int]:
        return self.turn("system", self.text(SYSTEM))

    def pieces(self, role: str, parts: Iterable[Part]) -> Iterator[tuple[list[int], bool]]:
        yield [self.im_start, *self.text(f"{role}\n")], False
        yield from self.content(parts)
        yield [self.im_end], True

    def seen(self, features: int) -> list[int]:
        config = self.config
        return [config.vision_start_token_id, *[config.image_token_id] * features, config.vision_end_token_id]

    def shown(self, image_grid_thw: torch.Tensor | None) -> list[ShownImage]:
        merged = self.config.vision_config.spatial_merge_size**2
        return [ShownImage(int(grid.prod()) // merged) for grid in (() if image_grid_thw is None else image_grid_thw)]

    def user(self, text: str, image_grid_thw: torch.Tensor | None = None) -> list[int]:
        content = [id for ids, _ in self.content(self.asked(text, image_grid_thw)) for id in ids]
        return [*self.turn("user", content), self.im_start, *self.text("assistant\n")]

    def vision_inputs(self, images: list[Image.Image], max_pixels: int | None = None) -> VisionInputs:
        """Prepare images as the base class says. Raises ValueError for an aspect ratio above 200."""
        bounds = {name: self.image_processor.size[name] for name in ("shortest_edge", "longest_edge")}  # in pixels
        if max_pixels is not None:
            bounds = {name: min(pixels, max_pixels) for name, pixels in bounds.items()}
        batch = self.image_processor(images=images, return_tensors="np", size=bounds)
        return VisionInputs(
            torch.from_numpy(np.asarray(batch["pixel_values"], np.float32)), torch.from_numpy(batch["image_grid_thw"])
        )
