"""Locate a model's files: in a directory, or on the Hugging Face hub under "org/name", cached after the download."""

import re
import sys
from pathlib import Path

from huggingface_hub import snapshot_download
from tqdm import tqdm

from vargpt_rl.common.errors import first_line
from vargpt_rl.model.whole import check_config

TINY = "tiny"
TINY_V1 = "tiny_v1"
EMBEDDED = Path(__file__).parents[1] / "tiny"
FETCHED = ("*.json", "*.safetensors", "*.jinja", "*.txt")
"""Files downloaded from the hub: weights that hold no code, settings, tokenizer. Nothing executable."""


def model_folder(checkpoint: str | Path) -> Path:
    """Return the absolute path of a model's directory, downloading "org/name" if it is not a local directory.

    As in ``from_pretrained``, the cache is used if the hub is unreachable or ``HF_HUB_OFFLINE`` is set, and
    ``HF_HOME``, ``HF_ENDPOINT`` and ``HF_TOKEN`` are honoured. Raises ValueError (one line) if there is no such model.
    """
    if Path(checkpoint).is_dir():
        return Path(checkpoint).resolve()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(checkpoint)):
        raise ValueError(f"checkpoint={checkpoint}: no such directory")
    try:
        bars = tqdm if sys.stderr.isatty() else None  # of the libraries' bars, the one that is wanted
        return Path(snapshot_download(str(checkpoint), allow_patterns=list(FETCHED), tqdm_class=bars))
    except Exception as error:  # the hub's client raises errors of many kinds
        raise ValueError(
            f"checkpoint={checkpoint}: no such directory, and not on the hub: {first_line(error)}"
        ) from error


def check_model(path: str) -> str:
    """Return the absolute path of a model directory of either family; "org/name" is downloaded (`model_folder`).

    Raises ValueError naming what was found instead, or the size in its configuration that no model has.
    """
    folder = EMBEDDED if path == TINY else model_folder(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"checkpoint={path}: no config.json in {folder}")
    try:
        check_config(folder)
    except ValueError as error:
        raise ValueError(f"checkpoint={path}: {error}") from error
    return str(folder)
