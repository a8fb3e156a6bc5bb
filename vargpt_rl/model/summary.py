"""Summary of a model directory: family, parameters by part, dtype, how it draws and what it was trained on."""

import json
import math
from collections import Counter
from pathlib import Path

from safetensors import safe_open

from vargpt_rl.model.drawing_defaults import DrawingDefaults, read_defaults
from vargpt_rl.model.hub import check_model
from vargpt_rl.model.parts import IMAGE_TOKENIZER, PARTS
from vargpt_rl.model.whole import weight_files

MB = 10**6


def describe_model(folder: Path) -> list[str]:
    """Describe a model directory without loading its weights. ValueError if it has none, or settings that are wrong."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    files = weight_files(folder)
    counts: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for file in files:
        with safe_open(file, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no dictionary
                tensor = tensors.get_slice(name)
                size = math.prod(tensor.get_shape())
                counts[part_of(name)] += size
                dtypes[tensor.get_dtype()] += size
    size = sum(file.stat().st_size for file in files)
    lines = [
        f"folder      {folder}",
        f"family      {config.get('model_type')}",
        f"weights     {size / MB:,.1f} MB in {len(files)} file{'s' if len(files) > 1 else ''}, {', '.join(dtypes)}",
        f"parameters  {sum(counts.values()) / 1e6:,.1f} million",
        *(f"  {part:18}{count / 1e6:,.1f} million" for part, count in counts.most_common()),
    ]
    return lines + _drawing(read_defaults(folder))


def main(arguments: list[str]) -> None:
    """Print the description of the model that the only argument names. ValueError if there is none."""
    print("\n".join(describe_model(Path(check_model(arguments[0])))))


def part_of(tensor: str) -> str:
    """Return the part of the model that a tensor belongs to."""
    known = PARTS | {IMAGE_TOKENIZER: (f"{IMAGE_TOKENIZER}.",)}
    return next((name for name, prefixes in known.items() if tensor.startswith(prefixes)), "other")


def _drawing(defaults: DrawingDefaults) -> list[str]:
    keys = ("resolution", "cfg", "tau", "top_k", "top_p")
    given = [f"{key}={value}" for key in keys if (value := getattr(defaults, key)) is not None]
    told = [f"draws with  {' '.join(given) or 'the published settings: it names none'}"]
    if defaults.turns is not None:
        told.append(f"trained on  conversations of {defaults.turns} turn{'s' if defaults.turns > 1 else ''}")
    if defaults.edits is not None:
        told.append(f"edits       {'trained on them' if defaults.edits else 'not trained on them'}")
    return told
