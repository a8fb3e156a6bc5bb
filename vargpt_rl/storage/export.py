"""The aligned model as an ordinary directory, which ``vargpt_rl.model.families`` reads."""

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from vargpt_rl.model.families import load_model
from vargpt_rl.storage.checkpoint import load_weights_into

BEST = "best.json"


def export_model(start: str, weights: Sequence[Path], target: Path, notes: dict[str, dict] | None = None) -> None:
    """Write the starting model with the weight sets applied, and its tokenizer files; ``notes`` are JSON files beside.

    ``target`` appears when whole, and what was there before goes then.
    """
    model = load_model(start, "auto")
    load_weights_into(model, weights)
    temporary, old = target.with_name(f".{target.name}"), _old(target)
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(start, temporary, ignore=shutil.ignore_patterns("model*.safetensors", "*.safetensors.index.json"))
    model.save_pretrained(temporary)
    for name, content in (notes or {}).items():
        (temporary / name).write_text(json.dumps(content, indent=1) + "\n")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(temporary, target)
    shutil.rmtree(old, ignore_errors=True)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def read_best(directory: Path) -> dict | None:
    """What is noted about the best policy so far in a run's ``best/``: metric, value, iteration, resolution."""
    path = directory / BEST
    return json.loads(path.read_text()) if path.exists() else None


def keep_best(start: str, weights: Sequence[Path], directory: Path, note: dict) -> None:
    """Export a policy to ``directory`` if its ``note["value"]`` is strictly higher than that of the one there."""
    if _old(directory).exists() and not directory.exists():  # cut off while one was put in the other's place
        os.replace(_old(directory), directory)
    best = read_best(directory)
    if math.isfinite(note["value"]) and (best is None or note["value"] > best["value"]):
        export_model(start, weights, directory, {BEST: note})
