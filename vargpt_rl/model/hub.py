"""Where a model's files are: in a directory, or on the hub under "org/name" and from then on in the hub's cache."""

import json
import re
from pathlib import Path

from huggingface_hub import snapshot_download

from vargpt_rl.model.families import family_named

TINY = "tiny"
TINY_V1 = "tiny_v1"
EMBEDDED = Path(__file__).parents[1] / "tiny"
FETCHED = ("*.json", "*.safetensors", "*.jinja", "*.txt")
"""What is fetched of a model on the hub: weights that hold no code, settings, tokenizer. Nothing that could run."""


def model_folder(checkpoint: str | Path) -> Path:
    """The absolute path of a model's directory; "org/name" that is no local directory is a model on the hub.

    As in ``from_pretrained``, the cache serves where the hub is out of reach or ``HF_HUB_OFFLINE`` is set, and
    ``HF_HOME``, ``HF_ENDPOINT`` and ``HF_TOKEN`` have their meaning. ValueError, of one line, where there is neither.
    """
    if Path(checkpoint).is_dir():
        return Path(checkpoint).resolve()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(checkpoint)):
        raise ValueError(f"checkpoint={checkpoint}: no such directory")
    try:
        return Path(snapshot_download(str(checkpoint), allow_patterns=list(FETCHED)))
    except Exception as error:  # the hub's client raises errors of many kinds
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"checkpoint={checkpoint}: no such directory, and not on the hub: {reason}") from error


def check_model(path: str) -> str:
    """A model directory of this architecture, absolute; "org/name" is fetched from the hub (`model_folder`).

    ValueError naming what was found instead.
    """
    folder = EMBEDDED if path == TINY else model_folder(path)
    settings = folder / "config.json"
    if not settings.is_file():
        raise ValueError(f"checkpoint={path}: no config.json in {folder}")
    try:
        family_named(json.loads(settings.read_text()).get("model_type"))
    except ValueError as error:
        raise ValueError(f"checkpoint={path}: {error}") from error
    return str(folder)
