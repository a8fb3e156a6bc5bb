"""Sampling that a checkpoint was trained and measured with: ``image_generation`` in its ``generation_config.json``.

What a user draws without settings is then what a run has measured.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from vargpt_rl.common.settings import Between, Count, NotNegative, Positive, parse

FILE = "generation_config.json"
KEY = "image_generation"
NO_EDITS = "was not trained on edits: expect no image that makes sense"
"""What to say of a checkpoint that is asked for an edit and has ``edits: false``."""


@dataclass
class DrawingDefaults:
    """Defaults of a checkpoint; null is unknown."""

    resolution: Count | None = None
    """Side in pixels of square images."""
    cfg: NotNegative | None = None
    """As in ``SamplingConfig``, like the next three."""
    tau: Positive | None = None
    top_k: Count | None = None
    top_p: Annotated[float, Between(0, 1, includes_low=False)] | None = None
    turns: Count | None = None
    """Turns of the conversations that it was trained on."""
    edits: bool | None = None
    """Whether it was trained on edits."""


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get(KEY, {}), dict):
        raise ValueError(f"{path}: expected an object, and in it {KEY}, another")
    return found


def read_defaults(folder: str | Path) -> DrawingDefaults:
    """Read the defaults of a model directory; all are null if it has none. ValueError naming the file if it is bad."""
    return parse(DrawingDefaults, _settings(Path(folder)).get(KEY, {}), f"{Path(folder) / FILE}: {KEY}")


def with_defaults(folder: str | Path, defaults: DrawingDefaults) -> dict[str, Any]:
    """Return the content of a model directory's ``generation_config.json`` with other defaults."""
    known = {key: value for key, value in asdict(defaults).items() if value is not None}
    return _settings(Path(folder)) | {KEY: known}
