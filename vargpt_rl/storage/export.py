"""Export a policy as an ordinary model directory, which ``vargpt_rl.model.families`` can load."""

import json
import math
import os
import shutil
from pathlib import Path

from vargpt_rl.storage.checkpoint import Policy, load_fused
from vargpt_rl.storage.files import atomic_dir, restore_dir
from vargpt_rl.storage.sharded import OTHER_FILES, TOKENIZER_FILES

BEST = "best.json"
BESIDE_WEIGHTS = ("config.json", *TOKENIZER_FILES, *OTHER_FILES)
"""Files of a model directory that an export takes over."""


def best_folder(run: Path, resolution: int) -> Path:
    """Return the folder of a run's best policy at a resolution: scores of images of different sizes say nothing."""
    return run / "best" / str(resolution)


def export_model(policy: Policy, target: Path, notes: dict[str, dict] | None = None) -> None:
    """Write the start model with the weight sets applied, an adapter merged, and its tokenizer files.

    ``notes`` maps names of extra JSON files to their contents. An older ``target`` is kept until the new one is whole.
    """
    model = load_fused(policy, "auto")
    with atomic_dir(target) as folder:
        for file in files_beside_weights(Path(policy.model)):
            shutil.copyfile(file, folder / file.name)
        model.save_pretrained(folder)
        for name, content in (notes or {}).items():
            (folder / name).write_text(json.dumps(content, indent=1) + "\n")


def files_beside_weights(folder: Path) -> list[Path]:
    """Return a model directory's tokenizer and settings files, which an export copies; others stay behind.

    ValueError for one that is no plain file, or a link that leaves the folder (or the cache of the hub around it): what
    it leads to must not get into a model that is given away.
    """
    root = folder.resolve()
    allowed = root.parents[1] if root.parent.name == "snapshots" else root  # the hub's cache links to its blobs
    found = []
    for name in BESIDE_WEIGHTS:
        file = folder / name
        if not os.path.lexists(file):
            continue
        if not file.is_file() or not file.resolve().is_relative_to(allowed):
            raise ValueError(f"{file}: expected a plain file of the model, got a link that leaves it or no file")
        found.append(file)
    return found


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
