"""Pairs of images that a reward is learned from: PNG files and a table of them in a folder, split by prompt.

The same words may be asked for under many prompt ids, so the split is by a prompt's text.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from PIL import Image

from vargpt_rl.data.batches import MULTIPLE, joined
from vargpt_rl.model.prompt import ChatTemplate
from vargpt_rl.storage.files import write_atomically

QUESTION = "Does this picture show: {prompt}? Answer Yes or No."
"""Question that a learned reward and the judge (`rewards.judge`) put to the model about an image."""
PAIRS = "pairs.jsonl"
WINNERS, OWN, GIVEN = "winners", "own", "given"
"""Kinds of pairs: a stronger system's image against a policy's, two images of policies, or two that came from files."""


@dataclass(frozen=True)
class RewardPair:
    """A prompt's text, and the file names of its chosen and its rejected image."""

    prompt: str
    chosen: str
    rejected: str


def pair_kinds(table: pd.DataFrame) -> pd.Series:
    """Return the kind of each row of a preference table, by how many of its images a policy drew."""
    drawn = table.chosen_version.notna().astype(int) + table.rejected_version.notna().astype(int)
    return drawn.map({2: OWN, 1: WINNERS, 0: GIVEN})


def is_held_out(prompt: str, fraction: float, seed: int) -> bool:
    """Tell whether a prompt is among the ``fraction`` that training does not see; depends on text and seed alone."""
    hashed = hashlib.blake2b(f"{seed} {prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(hashed) < fraction * 2**64


def split_by_prompt(table: pd.DataFrame, fraction: float, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split a preference table into rows to train on and held-out rows, which have no prompt in common."""
    held_out = table.prompt.map(lambda prompt: is_held_out(prompt, fraction, seed)).astype(bool)
    return table[~held_out], table[held_out]


def check_split(table: pd.DataFrame, fraction: float, seed: int, batch: int, where: object) -> None:
    """ValueError, naming ``where`` the table is from, with less than a batch to train on or nothing held out."""
    train, held_out = split_by_prompt(table, fraction, seed)
    if len(train) < batch or not len(held_out):
        raise ValueError(
            f"{where}: {len(table)} pairs of {table.prompt.nunique()} prompts leave {len(train)} to train on and "
            f"{len(held_out)} held out; expected at least a batch of {batch} and 1"
        )


def write_pairs_file(folder: Path, pairs: list[RewardPair]) -> None:
    """Write the table of a folder's pairs."""
    lines = [json.dumps(asdict(pair)) + "\n" for pair in pairs]
    write_atomically(folder / PAIRS, "".join(lines).encode())


def read_pairs_file(folder: Path) -> list[dict[str, str]]:
    """Read the pairs of a folder as rows with the fields of `RewardPair`."""
    return [json.loads(line) for line in (folder / PAIRS).read_text().splitlines()]


def reward_inputs(chat: ChatTemplate, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Collate images, each shown with the question about its prompt, into right-padded rows of a reward model."""
    shown = [chat.vision_inputs([image.convert("RGB")]) for image in images]
    rows = [
        chat.question(QUESTION.replace("{prompt}", prompt), vision.image_grid_thw)
        for prompt, vision in zip(prompts, shown, strict=True)
    ]
    return {
        "input_ids": chat.pad(rows, "right", multiple=MULTIPLE),
        "attention_mask": chat.pad([[1] * len(row) for row in rows], "right", value=0, multiple=MULTIPLE),
        **joined(shown),
    }


class RewardPairCollator:
    """Collate rows of `read_pairs_file` into a batch ordered [all chosen, all rejected], as TRL's trainer expects."""

    def __init__(self, chat: ChatTemplate, folder: Path):
        self.chat = chat
        self.folder = folder

    def __call__(self, pairs: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        names = [pair[side] for side in ("chosen", "rejected") for pair in pairs]
        images = [Image.open(self.folder / name) for name in names]
        return reward_inputs(self.chat, images, [pair["prompt"] for pair in pairs] * 2)
