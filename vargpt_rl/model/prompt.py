"""From conversations to token ids: a chat markup with the special tokens of pictures. Here v1.1's, which is Qwen2's.

A drawing answer is: optional text, ``image_gen_start``, L x ``image_gen_pad``, ``image_gen_end``, and what ends a turn
(specification, section 3; the published code of v1.1 pads L up to a multiple of 128, this model does not).
"""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vargpt_rl.model.configuration import VargptConfig

SYSTEM = "You are a helpful assistant."
REPLY = "Here is the picture."
"""What the assistant says before a picture, where a picture is asked for in so many words."""
IGNORED = -100


class Encoded(NamedTuple):
    """One row: token ids and the label of each (``IGNORED`` where it is not to be learned), both lists of T ints."""

    ids: list[int]
    labels: list[int]


class Pictures(NamedTuple):
    """Understood pictures, ready for the vision tower, and how many patches each has.

    ``pixel_values`` float: patches [P, 1176] in v1.1, pictures [pictures, 3, side, side] in v1; ``image_grid_thw``
    int64 [pictures, 3].
    """

    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor


class Markup:
    """Rows of a conversation. ``path`` is a directory (or hub name) with tokenizer files.

    A family says how a conversation begins (``system``), how a user's turn reads (``user``), which token is the ``end``
    of the assistant's turn, what is read for ``closing`` it, and how its vision tower takes pictures (``pictures``).
    """

    end: int
    closing: list[int]

    def __init__(self, path: str, config: PreTrainedConfig):
        self.config = config
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)

    def text(self, text: str) -> list[int]:
        """Ids of plain text; special tokens written in it stay text."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def system(self) -> list[int]:
        """What begins every conversation."""
        raise NotImplementedError

    def user(self, text: str, image_grid_thw: torch.Tensor | None = None) -> list[int]:
        """A user's turn (pictures first) and the opening of the assistant's turn."""
        raise NotImplementedError

    def pictures(self, images: list[Image.Image]) -> Pictures:
        """PIL pictures -> what the vision tower takes."""
        raise NotImplementedError

    def question(self, text: str, image_grid_thw: torch.Tensor | None = None) -> list[int]:
        """System turn, user turn (pictures first), and the opening of the assistant's turn."""
        return self.system() + self.user(text, image_grid_thw)

    def answered(self, text: str, answer: str, image_grid_thw: torch.Tensor | None = None) -> Encoded:
        """A question and its answer in words; the answer and its end are labels."""
        question, answer_ids = self.question(text, image_grid_thw), [*self.text(answer), self.end]
        return Encoded(question + answer_ids, [IGNORED] * len(question) + answer_ids)

    def drawing_prompt(self, text: str, reply: str, image_grid_thw: torch.Tensor | None = None) -> list[int]:
        """A request up to and including ``image_gen_start``: what sampling continues."""
        return [*self.question(text, image_grid_thw), *self.text(reply), self.config.image_gen_start_token_id]

    def drawn(self, text: str, reply: str, tokens: int, image_grid_thw: torch.Tensor | None = None) -> Encoded:
        """A request answered by a picture of ``tokens`` image tokens. Text labels: the reply and the markup."""
        question = self.question(text, image_grid_thw)
        reply_ids = [*self.text(reply), self.config.image_gen_start_token_id]
        closing = [self.config.image_gen_end_token_id, self.end]
        ids = question + reply_ids + [self.config.image_gen_pad_token_id] * tokens + closing
        labels = [IGNORED] * len(question) + reply_ids + [IGNORED] * tokens + closing
        return Encoded(ids, labels)

    def pad(self, rows: list[list[int]], side: str, value: int | None = None, multiple: int = 1) -> torch.Tensor:
        """int64 [B, T]: rows padded on ``side`` ("left" for sampling, "right" for training) to a common length."""
        value = self.tokenizer.pad_token_id if value is None else value
        width = -(-max(map(len, rows)) // multiple) * multiple
        padded = torch.full((len(rows), width), value)
        for i, row in enumerate(rows):
            at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            padded[i, at] = torch.tensor(row)
        return padded


class ChatFormat(Markup):
    """v1.1's markup, Qwen2's."""

    def __init__(self, path: str, config: VargptConfig):
        super().__init__(path, config)
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        self.im_start, self.im_end = (self.tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>"))
        self.end, self.closing = self.im_end, [self.im_end, *self.text("\n")]

    def turn(self, role: str, content: list[int]) -> list[int]:
        """``im_start`` role newline content ``im_end`` newline."""
        return [self.im_start, *self.text(f"{role}\n"), *content, self.im_end, *self.text("\n")]

    def system(self) -> list[int]:
        """The turn that begins every conversation."""
        return self.turn("system", self.text(SYSTEM))

    def user(self, text: str, image_grid_thw: torch.Tensor | None = None) -> list[int]:
        """A user's turn (pictures first) and the opening of the assistant's turn."""
        pictures: list[int] = []
        for grid in image_grid_thw if image_grid_thw is not None else ():
            features = int(grid.prod()) // self.config.vision_config.spatial_merge_size**2
            pictures += [self.config.vision_start_token_id, *[self.config.image_token_id] * features]
            pictures += [self.config.vision_end_token_id]
        return self.turn("user", pictures + self.text(text)) + [self.im_start, *self.text("assistant\n")]

    def pictures(self, images: list[Image.Image]) -> Pictures:
        """PIL pictures -> what the vision tower takes."""
        batch = self.image_processor(images=images, return_tensors="np")
        return Pictures(
            torch.from_numpy(np.asarray(batch["pixel_values"], np.float32)), torch.from_numpy(batch["image_grid_thw"])
        )
