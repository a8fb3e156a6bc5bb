"""Asking for faults, see `vargpt_rl.common.failpoints`."""

from pathlib import Path


def ask(folder: Path, point: str, fault: str = "kill") -> Path:
    """The file that asks for a fault; it is gone when that has come about."""
    file = folder / point
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(fault)
    return file
