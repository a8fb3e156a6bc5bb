"""Places of what a run keeps for people: small images, and margins of rewards."""

from pathlib import Path

IMAGES = "images"
"""Folder of a run directory."""
PAIRS = "pairs"
"""Name, instead of a moment, of the images of an iteration's pairs."""
CANDIDATES = "candidates"
"""Name of the images, and ending of the table, of the pairs that people are asked about."""


def images_folder(run: Path, stage: str, moment: str) -> Path:
    """Return the folder of the images that a stage of a run drew at a moment."""
    return run / IMAGES / f"{stage}-{moment}"


def margins_path(table: Path) -> Path:
    """Return the file of the margins of rewards on a preference table's pairs: JSON, by reward and pair id."""
    return table.with_suffix(".margins.json")


def pair_image(pair_id: str, side: str) -> str:
    """Return the file name of one side ("chosen" or "rejected") of a pair."""
    return f"{pair_id}-{side}.webp"
