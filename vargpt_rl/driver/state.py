"""The state of a run on disk, ``state.json``: finished steps, and hashes of everything else that is read back.

Each step's record has a hash of its own, so that the run can go back to before a damaged one. Another hash guards the
rest. A file that is no JSON object of this layout is refused.
"""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

from vargpt_rl.storage.files import write_atomically

LAYOUT = 5
"""Version of the run directory's steps and files. Directories of other versions are refused."""
NEW: dict[str, Any] = {
    "layout": LAYOUT,
    "steps": {},
    "served": {},
    "times": {},
    "files": {},
    "events": [],
    "restarts": 0,
    "seconds": 0.0,
    "config": None,
    "summary": None,
    "logs": {},
    "hashes": {},
}
ORIGINS = "origins"
"""Key of the hashes of what the run reads from elsewhere (`vargpt_rl.driver.origins`); a run that has just begun has
none."""
BEGUN_IN = "begun_in"
"""Key of the directory in which the run was begun, which relative paths in its settings start from."""
OPTIONAL = {
    ORIGINS: "the hashes of the run's inputs are damaged and taken anew",
    BEGUN_IN: "the directory in which the run was begun is damaged: relative paths start from the current one",
}
"""Keys that a state may lack, each under a hash of its own, and what is told if it is damaged."""
REST = ("times", "events", "restarts", "seconds", "config", "summary", "logs", "files")
"""Keys under one hash."""


def hash_of(value: object) -> str:
    """Return the hexadecimal blake2b hash of a JSON value; the order of keys does not matter."""
    plain = json.loads(json.dumps(value))  # keys as they are read again
    return hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=16).hexdigest()


def _record(state: dict[str, Any], step: str) -> str:
    return hash_of([step, state["steps"][step], state["served"].get(step)])


def _rest(state: dict[str, Any]) -> str:
    return hash_of([state[key] for key in REST])


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write the state with its hashes."""
    optional = {key: hash_of(state[key]) for key in OPTIONAL if key in state}
    state["hashes"] = {"": _rest(state), **optional, **{step: _record(state, step) for step in state["steps"]}}
    write_atomically(path, json.dumps(state, indent=1).encode())


def read_state(path: Path) -> tuple[dict[str, Any], str | None, list[str]]:
    """Read a state. Return it, the first step whose record is damaged, and what else is damaged and begins anew.

    Raises ValueError naming the file if it is not readable at all or of another layout.
    """
    try:
        state = json.loads(path.read_bytes())
        kinds = {key: type(value) for key, value in NEW.items() if key in ("steps", "served", "files", "hashes")}
        if not isinstance(state, dict):
            raise ValueError(f"expected a JSON object, got {type(state).__name__}")
        if state.get("layout", 1) != LAYOUT:
            raise ValueError(
                f"layout {state.get('layout', 1)}, expected {LAYOUT}: another version of vargpt_rl wrote it"
            )
        for key, kind in kinds.items():
            if not isinstance(state.get(key), kind):
                raise ValueError(f"expected {key}, of type {kind.__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged or not of this version ({error}): put back a copy of it, remove {path.parent}, or give "
            "this run another name=..."
        ) from error
    hashes = state["hashes"]
    told = []
    if any(key not in state for key in REST) or hashes.get("") != _rest(state):
        told.append(f"{path}: its events, restarts and seconds are damaged and begin anew")
        known = {"files": state["files"]}  # an entry that changed does not fit its file
        state |= {key: copy.deepcopy(NEW[key]) for key in REST} | known
    for key, damage in OPTIONAL.items():
        if hashes.get(key) != (hash_of(state[key]) if key in state else None):
            told.append(f"{path}: {damage}")
            state.pop(key, None)
    bad = next((step for step in state["steps"] if hashes.get(step) != _record(state, step)), None)
    state["files"] = {
        name: entry for name, entry in state["files"].items() if isinstance(entry, dict) and _is_inside(name)
    }
    return state, bad, told


def _is_inside(name: str) -> bool:
    return not Path(name).is_absolute() and ".." not in Path(name).parts
