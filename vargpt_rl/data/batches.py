"""Training examples and how they are batched.

Drawings travel as features of the image tokenizer, not as bits: bitwise self-correction flips bits and recomputes the
labels of later scales, for which the features are needed. Preference pairs travel as bits, for they are fixed.

Shape legend: B rows, T positions, N drawings in the batch, L image tokens, d bits a token, h w latent grid.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from vargpt_rl.data.types import Prompt
from vargpt_rl.model.bits import unpack
from vargpt_rl.model.prompt import IGNORED, ChatFormat, Encoded, Pictures
from vargpt_rl.model.scales import STRIDE, schedule_for, token_count

MULTIPLE = 8
"""Rows are padded to a multiple of this, as tensor cores like it."""


class PictureSource(Protocol):
    """Where pictures come from: ``load`` gives the RGB picture of a key, ``side`` x ``side`` pixels."""

    def load(self, key: str, side: int) -> Image.Image: ...


@dataclass(frozen=True)
class DrawExample:
    """A request answered by a picture: ``features`` float16 [d, h, w]. An edit also has the picture to be edited."""

    prompt: Prompt
    features: np.ndarray
    pictures: Pictures | None = None


@dataclass(frozen=True)
class TextExample:
    """A question, possibly about pictures, answered in words."""

    question: str
    answer: str
    pictures: Pictures | None = None


Example = DrawExample | TextExample


def shown_picture(prompt: Prompt, source: PictureSource, chat: ChatFormat) -> Pictures | None:
    """The picture that a prompt shows, if it shows one, for the vision tower."""
    return chat.pictures([source.load(prompt.shown, prompt.shown_side)]) if prompt.shown is not None else None


def joined(pictures: Iterable[Pictures | None]) -> dict[str, torch.Tensor]:
    """``pixel_values`` and ``image_grid_thw`` of the rows that have pictures, in order; nothing if none has."""
    seen = [picture for picture in pictures if picture is not None]
    return {field: torch.cat([getattr(picture, field) for picture in seen]) for field in Pictures._fields if seen}


def _pad_rows(chat: ChatFormat, rows: list[Encoded]) -> dict[str, torch.Tensor]:
    ids = [row.ids for row in rows]
    return {
        "input_ids": chat.pad(ids, "right", multiple=MULTIPLE),
        "attention_mask": chat.pad([[1] * len(row) for row in ids], "right", value=0, multiple=MULTIPLE),
    }


class SftCollator:
    """Examples -> a batch of right-padded rows; drawings of one size. Texts are labels, pads and prompts are not."""

    def __init__(self, chat: ChatFormat):
        self.chat = chat

    def _encode(self, example: Example) -> Encoded:
        grid = example.pictures.image_grid_thw if example.pictures else None
        if isinstance(example, TextExample):
            return self.chat.answered(example.question, example.answer, grid)
        height, width = (side * STRIDE for side in example.features.shape[1:])
        tokens = token_count(schedule_for(height, width))
        return self.chat.drawn(example.prompt.text, example.prompt.reply, tokens, grid)

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        rows = [self._encode(example) for example in examples]
        batch = _pad_rows(self.chat, rows)
        batch["labels"] = self.chat.pad([row.labels for row in rows], "right", value=IGNORED, multiple=MULTIPLE)
        drawings = [example for example in examples if isinstance(example, DrawExample)]
        if drawings:
            batch["features"] = torch.from_numpy(np.stack([example.features for example in drawings]))
        return batch | joined(example.pictures for example in examples)


class PairCollator:
    """Rows of the preference table -> a batch ordered [all chosen, all rejected].

    ``completion_mask`` is 1 at image tokens only: it is the image-token mask of DPO.
    """

    def __init__(self, chat: ChatFormat):
        self.chat = chat

    def __call__(self, pairs: list[dict]) -> dict[str, torch.Tensor]:
        resolution = pairs[0]["resolution"]
        tokens, depth = token_count(schedule_for(resolution)), self.chat.config.image_tokenizer_config.bits
        rows = [self.chat.drawn(pair["prompt"], pair["reply"], tokens) for pair in pairs] * 2
        batch = _pad_rows(self.chat, rows)
        batch["completion_mask"] = (batch["input_ids"] == self.chat.config.image_gen_pad_token_id).long()
        packed = [pair[key] for key in ("chosen_bits", "rejected_bits") for pair in pairs]
        batch["bits"] = torch.from_numpy(np.stack([unpack(bits, tokens, depth) for bits in packed]))
        batch["resolution"] = torch.tensor(resolution)
        for side in ("chosen", "rejected"):
            logps = [pair[f"reference_{side}_logp"] for pair in pairs]
            batch[f"ref_{side}_logps"] = torch.tensor(logps, dtype=torch.float64)
        by_scale = [pair[f"reference_{side}_by_scale"] for side in ("chosen", "rejected") for pair in pairs]
        batch["ref_by_scale"] = torch.tensor(np.stack(by_scale), dtype=torch.float64)
        return batch
