"""The wordings that lie beside the code, as data."""

from functools import cache
from pathlib import Path

import yaml


@cache
def bank(name: str) -> dict:
    """What ``<name>.yaml`` has; the file says what is in it."""
    return yaml.safe_load(Path(__file__).with_name(f"{name}.yaml").read_text(encoding="utf-8"))
