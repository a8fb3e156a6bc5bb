"""Where a model's files are: in a directory, or on the hub under "org/name" and from then on in the hub's cache."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download

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
