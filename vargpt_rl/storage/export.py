"""Export a policy as an ordinary model directory, which ``vargpt_rl.model.families`` can load."""

import json
import math
import shutil
from pathlib import Path

from vargpt_rl.storage.checkpoint import Policy, load_fused
from vargpt_rl.storage.files import atomic_dir, restore_dir

BEST = "best.json"


def best_folder(run: Path, resolution: int) -> Path:
    """Return the folder of a run's best policy at a resolution: scores of images of different sizes say nothing."""
    return run / "best" / str(resolution)


def export_model(policy: Policy, target: Path, notes: dict[str, dict] | None = None) -> None:
    """Write the start model with the weight sets applied, an adapter merged, and its tokenizer files.

    ``notes`` maps names of extra JSON files to their contents. An older ``target`` is kept until the new one is whole.
    """
    model = load_fused(policy, "auto")
    with atomic_dir(target) as folder:
        without_weights = shutil.ignore_patterns("model*.safetensors", "*.safetensors.index.json")
        shutil.copytree(policy.model, folder, ignore=without_weights, dirs_exist_ok=True)
        model.save_pretrained(folder)
        for name, content in (notes or {}).items():
            (folder / name).write_text(json.dumps(content, indent=1) + "\n")


def read_best(directory: Path) -> dict | None:
    """Read the record of a `best_folder`: metric, value, iteration, resolution. None if there is none yet."""
    path = directory / BEST
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        float(found["value"])
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove {directory}") from error


def keep_best(policy: Policy, directory: Path, note: dict, files: dict[str, dict] | None = None) -> None:
    """Export a policy to ``directory`` if its ``note["value"]`` is strictly higher than the recorded one.

    ``files`` are further JSON files of it.
    """
    restore_dir(directory)
    best = read_best(directory)
    if math.isfinite(note["value"]) and (best is None or note["value"] > best["value"]):
        export_model(policy, directory, {BEST: note} | (files or {}))
