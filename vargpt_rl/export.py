"""The aligned model as an ordinary directory, which ``vargpt_rl.model.families`` reads."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from vargpt_rl.checkpoint import load_weights_into
from vargpt_rl.model.families import load_model


def export_model(start: str, weights: Sequence[Path], target: Path) -> None:
    """Write the starting model with the weight sets applied, and its tokenizer files. ``target`` appears when whole."""
    model = load_model(start, "auto")
    load_weights_into(model, weights)
    temporary = target.with_name(f".{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(start, temporary, ignore=shutil.ignore_patterns("model*.safetensors", "*.safetensors.index.json"))
    model.save_pretrained(temporary)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
