"""Training examples, and their collators.

Images to draw travel as features of the image tokenizer, not as its tokens: bitwise self-correction flips bits and
recomputes the labels of later scales from the features. Preference pairs travel as tokens, since they are fixed.

Shape legend: B rows, T positions, N images to draw in the batch, L image tokens, s symbols a token (32 bits, or one
index), d latent channels, h w latent grid.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vargpt_rl.data.images import ImageSource
from vargpt_rl.data.mixture import pack
from vargpt_rl.data.samples import Prompt
from vargpt_rl.data.states import padded_states
from vargpt_rl.model.bits import unpack
from vargpt_rl.model.prompt import IGNORED, ChatTemplate, EncodedText, VisionInputs
from vargpt_rl.model.scales import STRIDE, token_count

MULTIPLE = 8
"""Rows are padded to a multiple of this, which suits tensor cores."""


@dataclass(frozen=True)
class DrawExample:
    """A request answered by an image: ``features`` float16 [d, h, w]. An edit also shows the image to edit."""

    prompt: Prompt
    features: np.ndarray
    vision: VisionInputs | None = None


@dataclass(frozen=True)
class TextExample:
    """A question, possibly about images, answered in words."""

    question: str
    answer: str
    vision: VisionInputs | None = None


@dataclass(frozen=True)
class Row:
    """An encoded conversation, its shown images, and its images to draw, in order and all of one size.

    An image to draw is float16 features [d, h, w], or uint8 pixels [H, W, 3] whose features the learner computes.
    """

    text: EncodedText
    vision: VisionInputs | None = None
    drawn: tuple[np.ndarray, ...] = ()


Example = Row | DrawExample | TextExample


def shown_image(prompt: Prompt, source: ImageSource, chat: ChatTemplate) -> VisionInputs | None:
    """Load the image that a prompt shows, if it shows one, for the vision tower."""
    return chat.vision_inputs([source.load(prompt.shown, prompt.shown_side)]) if prompt.shown is not None else None


def joined(vision: Iterable[VisionInputs | None]) -> dict[str, torch.Tensor]:
    """Join ``pixel_values`` and ``image_grid_thw`` of the rows that have images, in order; empty if none has."""
    seen = [image for image in vision if image is not None]
    return {field: torch.cat([getattr(image, field) for image in seen]) for field in VisionInputs._fields if seen}


def _pad_rows(chat: ChatTemplate, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    return {
        "input_ids": chat.pad(rows, "right", multiple=MULTIPLE),
        "attention_mask": chat.pad([[1] * len(row) for row in rows], "right", value=0, multiple=MULTIPLE),
    }


class SftCollator:
    """Collate examples into right-padded rows; images to draw have one size. Labels exclude prompts and pads.

    With ``packs``, texts without images share rows if the batch gets no wider; ``blocks`` int64 [B, T] then numbers the
    texts of each row from 1 (0 at pads), so that the model keeps them apart. With ``shows``, a batch without shown
    images gets a blank one without labels: ranks that reduce gradients or gather the vision tower's weights together
    must all run the tower.
    """

    def __init__(self, chat: ChatTemplate, packs: bool = False, shows: bool = False):
        self.chat = chat
        self.packs = packs
        self.shows = shows

    def _row(self, example: Example) -> Row:
        if isinstance(example, Row):
            return example
        grid = example.vision.image_grid_thw if example.vision else None
        if isinstance(example, TextExample):
            return Row(self.chat.answered(example.question, example.answer, grid), example.vision)
        height, width = (side * STRIDE for side in example.features.shape[1:])
        tokens = token_count(self.chat.config.image_tokenizer_config.schedule_for(height, width))
        text = self.chat.drawn(example.prompt.text, example.prompt.reply, tokens, grid)
        return Row(text, example.vision, (example.features,))

    def _grouped(self, rows: list[Row]) -> list[list[Row]]:
        """Group examples that share a row."""
        texts = [row for row in rows if row.vision is None and not row.drawn] if self.packs else []
        if len(texts) < 2:
            return [[row] for row in rows]
        widest = max(len(row.text.ids) for row in rows)
        limit = -(-widest // MULTIPLE) * MULTIPLE
        packs = pack([len(row.text.ids) for row in texts], limit)
        alone = [[row] for row in rows if row.vision is not None or row.drawn]
        return alone + [[texts[index] for index in indices] for indices in packs]

    def _blank(self) -> Row:
        side = self.chat.least_side
        vision = self.chat.vision_inputs([Image.new("RGB", (side, side))], side**2)
        ids = [id for shown in self.chat.shown(vision.image_grid_thw) for id in self.chat.seen(shown.features)]
        return Row(EncodedText(ids, [IGNORED] * len(ids)), vision)

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        groups = self._grouped([self._row(example) for example in examples])
        if self.shows and not any(row.vision for group in groups for row in group):
            groups[-1].append(self._blank())
        rows = [row for group in groups for row in group]
        batch = _pad_rows(self.chat, [[id for row in group for id in row.text.ids] for group in groups])
        labels = [[label for row in group for label in row.text.labels] for group in groups]
        batch["labels"] = self.chat.pad(labels, "right", value=IGNORED, multiple=MULTIPLE)
        if len(groups) < len(rows):
            blocks = [[number for number, row in enumerate(group, 1) for _ in row.text.ids] for group in groups]
            batch["blocks"] = self.chat.pad(blocks, "right", value=0, multiple=MULTIPLE)
        drawn = [image for row in rows for image in row.drawn]
        if drawn:
            pixels = drawn[0].dtype == np.uint8
            batch["crops" if pixels else "features"] = torch.from_numpy(np.stack(drawn))
        return batch | joined(row.vision for row in rows)


def _drawn_rows(
    chat: ChatTemplate, rows: list[dict], packed: list[bytes], scales: int | None
) -> dict[str, torch.Tensor]:
    """Prompts answered by the first ``scales`` scales of their images, and these as integers [B, L, s], ``bits``."""
    resolution, tokenizer = rows[0]["resolution"], chat.config.image_tokenizer_config
    schedule = tokenizer.schedule_for(resolution)
    tokens, kept = token_count(schedule), token_count(schedule[:scales])
    batch = _pad_rows(chat, [chat.drawn(row["prompt"], row["reply"], kept).ids for row in rows])
    labels = [unpack(bits, tokens, *tokenizer.symbols)[:kept] for bits in packed]
    return batch | {"bits": torch.from_numpy(np.stack(labels)), "resolution": torch.tensor(resolution)}


class PairCollator:
    """Collate rows of the preference table into a batch ordered [all chosen, all rejected].

    ``completion_mask`` is 1 at image tokens only: it is the image-token mask of DPO. With ``scales``, images are cut to
    that many coarse scales; the references stay those of all scales. ``states`` is a folder of stored states, which
    become ``states`` [B, T, H].
    """

    def __init__(self, chat: ChatTemplate, scales: int | None = None, states: Path | None = None):
        self.chat = chat
        self.scales = scales
        self.states = states

    def __call__(self, pairs: list[dict]) -> dict[str, torch.Tensor]:
        packed = [pair[key] for key in ("chosen_bits", "rejected_bits") for pair in pairs]
        batch = _drawn_rows(self.chat, pairs * 2, packed, self.scales)
        if self.states is not None:
            drawn = [(pair["prompt"], pair["reply"], bits) for pair, bits in zip(pairs * 2, packed, strict=True)]
            batch["states"] = padded_states(self.states, drawn, batch["input_ids"].shape[1])
        batch["completion_mask"] = (batch["input_ids"] == self.chat.config.image_gen_pad_token_id).long()
        for side in ("chosen", "rejected"):
            logps = [pair[f"reference_{side}_logp"] for pair in pairs]
            batch[f"ref_{side}_logps"] = torch.tensor(logps, dtype=torch.float64)
        by_scale = [pair[f"reference_{side}_by_scale"] for side in ("chosen", "rejected") for pair in pairs]
        batch["ref_by_scale"] = torch.tensor(np.stack(by_scale), dtype=torch.float64)
        return batch


class PolicyBatchCollator:
    """Collate rows of `vargpt_rl.data.policy_batches`, each with a ``weight``, into a batch in the same order.

    With ``scales``, images are cut to that many coarse scales; log-probabilities by scale stay those of all scales.
    ``states``: see `PairCollator`.
    """

    def __init__(self, chat: ChatTemplate, scales: int | None = None, states: Path | None = None):
        self.chat = chat
        self.scales = scales
        self.states = states

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = _drawn_rows(self.chat, rows, [row["bits"] for row in rows], self.scales)
        if self.states is not None:
            drawn = [(row["prompt"], row["reply"], row["bits"]) for row in rows]
            batch["states"] = padded_states(self.states, drawn, batch["input_ids"].shape[1])
        batch["learner_step"] = torch.tensor([row["learner_step"] for row in rows])
        batch["tau"] = torch.tensor(rows[0]["tau"], dtype=torch.float64)
        batch["group"] = torch.tensor([row["group"] for row in rows])
        rewards = [math.nan if row["reward"] is None else row["reward"] for row in rows]
        batch["reward"] = torch.tensor(rewards, dtype=torch.float64)
        for name in ("advantage", "weight", "sampler_by_scale", "reference_by_scale"):
            values = [row[name] for row in rows]
            if None not in values:
                batch[name] = torch.tensor(values, dtype=torch.float64)
        return batch
