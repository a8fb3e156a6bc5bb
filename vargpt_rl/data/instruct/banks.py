"""Word lists and patterns, stored as YAML beside the code."""

from functools import cache
from pathlib import Path

import yaml


@cache
def bank(name: str) -> dict:
    """Load ``<name>.yaml``; its comments explain its contents."""
    return yaml.safe_load(Path(__file__).with_name(f"{name}.yaml").read_text(encoding="utf-8"))
