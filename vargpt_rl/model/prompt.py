"""From conversations to token ids: a chat markup with the special tokens of images. Here v1.1's, which is Qwen2's.

A drawn image is ``image_gen_start``, L x ``image_gen_pad``, ``image_gen_end``; an answer has any number of them among
its words (specification, section 3; the published code of v1.1 pads L up to a multiple of 128, this model does not).
"""

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
"""What the assistant says before an image, where an image is asked for in so many words."""
IGNORED = -100


class EncodedText(NamedTuple):
    """One row: token ids and the label of each (``IGNORED`` where it is not to be learned), both lists of T ints."""

    ids: list[int]
    labels: list[int]


class ShownImage(NamedTuple):
    """The place of an image that the user shows, and how many features the vision tower has for it."""

    features: int


class ImageToDraw(NamedTuple):
    """The place of an image that the assistant draws, of L ``tokens``."""

    tokens: int


Part = str | ShownImage | ImageToDraw
"""A piece of a turn: words, or the place of an image."""


class VisionInputs(NamedTuple):
    """Understood images, ready for the vision tower, and the grid of patches of each.

    ``pixel_values`` float: patches [P, 1176] in v1.1, images [images, 3, side, side] in v1; ``image_grid_thw``
    int64 [images, 3].
    """

    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor


class ChatTemplate:
    """Rows of a conversation. ``path`` is a directory (or hub name) with tokenizer files.

    A family says what begins a conversation (``system``), what its turns are made of (``pieces``, ``asked``,
    ``seen``), which token is the ``end`` of the assistant's turn and what stands ``between`` two turns, and how its
    vision tower takes images (``shown``, ``images``).
    """

    end: int
    between: list[int]
    least_side: int
    """Pixels a side of the smallest image that the vision tower takes."""

    def __init__(self, path: str, config: PreTrainedConfig):
        self.config = config
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)

    def system(self) -> list[int]:
        """What begins every conversation."""
        raise NotImplementedError

    def pieces(self, role: str, parts: Iterable[Part]) -> Iterator[tuple[list[int], bool]]:
        """The ids of each piece of a turn but what follows it, and whether they are words."""
        raise NotImplementedError

    def asked(self, text: str, image_grid_thw: torch.Tensor | None) -> list[Part]:
        """A user's turn, images first."""
        return [*self.shown(image_grid_thw), text]

    def user(self, text: str, image_grid_thw: torch.Tensor | None = None) -> list[int]:
        """A user's turn (images first) and the opening of the assistant's turn."""
        raise NotImplementedError

    def seen(self, features: int) -> list[int]:
        """The ids of an image that is shown."""
        raise NotImplementedError

    def shown(self, image_grid_thw: torch.Tensor | None) -> list[ShownImage]:
        """The places of images that were read into these grids."""
        raise NotImplementedError

    def vision_inputs(self, images: list[Image.Image], max_pixels: int | None = None) -> VisionInputs:
        """PIL images -> what the vision tower takes, of at most ``max_pixels`` each if that is less than the model's.

        ValueError for one that it cannot take.
        """
        raise NotImplementedError

    def text(self, text: str) -> list[int]:
        """Ids of plain text; special tokens written in it stay text."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def content(self, parts: Iterable[Part]) -> Iterator[tuple[list[int], bool]]:
        """The ids of each piece, and whether they can be learned as text."""
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
        """A whole conversation, the turns of user and assistant after the system's.

        Labels: the words of the assistant, the marks before and after the images it draws, and the end of its turns.
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
        """What closes the assistant's turn when another follows."""
        return [self.end, *self.between]

    def question(self, text: str, image_grid_thw: torch.Tensor | None = None) -> list[int]:
        """System turn, user turn (images first), and the opening of the assistant's turn."""
        return self.system() + self.user(text, image_grid_thw)

    def replied(self, text: str, reply: Sequence[Part], image_grid_thw: torch.Tensor | None = None) -> EncodedText:
        """One turn of the user (images first) and the assistant's reply to it."""
        return self.encode([("user", self.asked(text, image_grid_thw)), ("assistant", reply)])

    def answered(self, text: str, answer: str, image_grid_thw: torch.Tensor | None = None) -> EncodedText:
        """A question and its answer in words."""
        return self.replied(text, [answer], image_grid_thw)

    def drawing_prompt(self, text: str, reply: str, image_grid_thw: torch.Tensor | None = None) -> list[int]:
        """A request up to and including ``image_gen_start``: what sampling continues."""
        return [*self.question(text, image_grid_thw), *self.text(reply), self.config.image_gen_start_token_id]

    def drawn(self, text: str, reply: str, tokens: int, image_grid_thw: torch.Tensor | None = None) -> EncodedText:
        """A request answered by an image of ``tokens`` image tokens."""
        return self.replied(text, [reply, ImageToDraw(tokens)], image_grid_thw)

    def pad(self, rows: list[list[int]], side: str, value: int | None = None, multiple: int = 1) -> torch.Tensor:
        """int64 [B, T]: rows padded on ``side`` ("left" for sampling, "right" for training) to a common length."""
        value = self.tokenizer.pad_token_id if value is None else value
        width = -(-max(map(len, rows)) // multiple) * multiple
        padded = torch.full((len(rows), width), value)
        for i, row in enumerate(rows):
            at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            padded[i, at] = torch.tensor(row)
        return padded


class ChatFormat(ChatTemplate):
    """v1.1's markup, Qwen2's."""

    def __init__(self, path: str, config: VargptConfig):
        super().__init__(path, config)
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        self.im_start, self.im_end = (self.tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>"))
        self.end, self.between = self.im_end, self.text("\n")
        self.least_side = config.vision_config.patch_size * config.vision_config.spatial_merge_size

    def turn(self, role: str, content: list[int]) -> list[int]:
        """``im_start`` role newline content ``im_end`` newline."""
        return [self.im_start, *self.text(f"{role}\n"), *content, self.im_end, *self.text("\n")]

    def system(self) -> list[int]:
        """The turn that begins every conversation."""
        return self.turn("system", self.text(SYSTEM))

    def pieces(self, role: str, parts: Iterable[Part]) -> Iterator[tuple[list[int], bool]]:
        yield [self.im_start, *self.text(f"{role}\n")], False
        yield from self.content(parts)
        yield [self.im_end], True

    def seen(self, features: int) -> list[int]:
        config = self.config
        return [config.vision_start_token_id, *[config.image_token_id] * features, config.vision_end_token_id]

    def shown(self, image_grid_thw: torch.Tensor | None) -> list[ShownImage]:
        """The places of images that were read into these grids."""
        merged = self.config.vision_config.spatial_merge_size**2
        return [ShownImage(int(grid.prod()) // merged) for grid in (() if image_grid_thw is None else image_grid_thw)]

    def user(self, text: str, image_grid_thw: torch.Tensor | None = None) -> list[int]:
        """A user's turn (images first) and the opening of the assistant's turn."""
        content = [id for ids, _ in self.content(self.asked(text, image_grid_thw)) for id in ids]
        return [*self.turn("user", content), self.im_start, *self.text("assistant\n")]

    def vision_inputs(self, images: list[Image.Image], max_pixels: int | None = None) -> VisionInputs:
        """PIL images -> what the vision tower takes, of at most ``max_pixels`` each if that is less than the model's.

        ValueError for one that is more than 200 times as long as wide.
        """
        bounds = {name: self.image_processor.size[name] for name in ("shortest_edge", "longest_edge")}  # in pixels
        if max_pixels is not None:
            bounds = {name: min(pixels, max_pixels) for name, pixels in bounds.items()}
        batch = self.image_processor(images=images, return_tensors="np", size=bounds)
        return VisionInputs(
            torch.from_numpy(np.asarray(batch["pixel_values"], np.float32)), torch.from_numpy(batch["image_grid_thw"])
        )
