"""From the command line to a checked configuration. Every fault is a ValueError of one line that names the key.

Values of text keys are taken as written: only numbers, lists and dictionaries are read by Hydra's grammar. A leading
``+`` is allowed and means nothing: a key is known or it is not.
"""

import difflib
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import is_dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, get_origin

import yaml
from antlr4.error.Errors import RecognitionException
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.schema import LoopConfig
from vargpt_rl.common.errors import first_line
from vargpt_rl.common.fields import config_groups
from vargpt_rl.common.secret_check import check_secrets
from vargpt_rl.common.settings import as_written, bare, build, check_keys, check_ranges, kind_at, unquoted
from vargpt_rl.data.records.sources import RecordSource

REFERENCE = re.compile(r"\$\{[^{}]+\}")
"""A reference to another key or a resolver, ``${oc.env:HOME}``."""


RESUME = "resume"
"""Key that is no setting: the folder of a run, whose settings replace the defaults."""


def load_config(overrides: list[str], assumed: dict[str, str] | None = None) -> LoopConfig:
    """Compose ``configs/loop.yaml`` with ``key=value`` overrides and check the result.

    A value that is given for all resolutions wins over one that a file has for one of them, under ``at``.
    With ``resume=FOLDER``, the settings are those of the run in that folder, wherever it was begun, instead.
    ``assumed`` are values for keys that an experiment leaves empty, where they are not given. Secrets are refused.
    """
    groups: list[str] = []
    saved: Path | None = None
    values: list[tuple[str, dict[str, Any]]] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.lstrip("+")
        check_secrets(text, key.lstrip("~"))  # before an error repeats one
        if key.startswith("~") and not equals:
            values.append((override, _emptied(key[1:], override)))
            continue
        if not equals or text == "???":  # OmegaConf's word for no value
            raise ValueError(f"{override}: expected key=value")
        if key == RESUME:
            saved = Path(text)
        elif key in config_groups():
            groups.append(f"{key}={_choice(key, text)}")
        else:
            values.append((override, _nested(key, text, override)))
    composed = deepcopy(_composed(tuple(groups))) if saved is None else _saved(saved, groups)
    given = [nested for override, nested in values if not override.startswith("~")]
    for at_one_resolution, nested in product(composed.at.values(), given):
        _drop(at_one_resolution, nested)
    for override, nested in values:
        _merge(composed, override, nested)
    for key, value in (assumed or {}).items():
        composed[key] = composed[key] or value
    try:
        check_secrets(OmegaConf.to_container(composed, resolve=True, enum_to_str=True), "")
        config = build(LoopConfig, composed)
    except OmegaConfBaseException as error:
        raise ValueError(" ".join(str(error).split())) from error
    config.check_resolutions()
    return config


def _drop(settings: DictConfig, given: Mapping[str, Any]) -> None:
    """Remove the keys of ``given`` from settings."""
    for key, value in given.items():
        if isinstance(value, Mapping) and isinstance(settings.get(key), DictConfig):
            _drop(settings[key], value)
        else:
            settings.pop(key, None)


def _merge(composed: DictConfig, override: str, nested: dict[str, Any]) -> None:
    """Apply the values of an override. ValueError if they are not of the type of their key."""
    try:
        if override.startswith("~"):
            OmegaConf.update(composed, override[1:], nested, merge=False)
        else:
            composed.merge_with(nested)
    except OmegaConfBaseException as error:
        raise ValueError(f"{override}: {first_line(error)}") from error


@cache
def _composed(groups: tuple[str, ...]) -> DictConfig:
    """Compose the files once a process; callers change copies."""
    ConfigStore.instance().store(name="schema", node=LoopConfig)
    try:
        with initialize_config_module("configs", version_base="1.3"):
            composed = compose("loop", overrides=list(groups))
    except HydraException as error:
        raise ValueError(" ".join(str(error).split())) from error
    OmegaConf.set_struct(composed, False)  # of dictionaries; a dataclass refuses other keys by itself
    return composed


def _saved(folder: Path, groups: list[str]) -> DictConfig:
    """Return the settings of a run, and its place now. ValueError if there are none, or if ``groups`` are given too."""
    if groups:
        raise ValueError(f"{groups[0]}: expected no group of settings with {RESUME}={folder}, which has all settings")
    path = folder / "config.yaml"
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: expected the settings of a run: {' '.join(str(error).split())}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: expected the settings of a run, got {type(found).__name__}")
    at, here = folder.resolve(), Path.cwd()
    runs = at.parent.relative_to(here) if at.parent.is_relative_to(here) else at.parent
    place = {"name": at.name, "runs": str(runs)}
    composed = OmegaConf.structured(LoopConfig)
    try:
        check_keys(LoopConfig, {key: value for key, value in found.items() if key not in ("at", "data")})
        composed.merge_with(found, place)
    except (OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"{path}: {first_line(error)}") from error
    OmegaConf.set_struct(composed, False)
    return composed


def _choice(group: str, text: str) -> str:
    choices = config_groups()[group]
    if text not in (*choices, "null"):
        near = difflib.get_close_matches(text, choices, n=1)
        raise ValueError(
            f"{group}={text}: " + (f"did you mean {near[0]}?" if near else f"expected one of {', '.join(choices)}")
        )
    return text


def _nested(key: str, text: str, override: str) -> dict[str, Any]:
    """Return the value of a dotted key in nested dictionaries. ValueError if there is no such key."""
    names = key.split(".")
    try:
        kind = _kind_at(names)
        nested: Any = _value(kind, text)
        check_keys(kind, nested)
        if not is_dataclass(bare(kind)):
            check_ranges(kind, nested, key)  # again in `build`, but at once and by the whole key
    except ValueError as error:
        told = str(error)
        raise ValueError(told if told.startswith(f"{key}=") else f"{override}: {told}") from error
    for name in reversed(names):
        nested = {name: nested}
    return nested


def _emptied(key: str, override: str) -> dict[str, Any]:
    """Return what ``~key`` leaves of a dictionary. ValueError for any other key."""
    if get_origin(bare(_kind_at(key.split(".")))) is not dict:
        raise ValueError(f"{override}: expected a dictionary after ~, such as ~at")
    return {}


def _kind_at(names: list[str]) -> Any:
    """Return the type of a dotted key, below ``at`` and ``data.sources`` too, which are free dictionaries."""
    if names[0] == "at" and len(names) > 2:
        return kind_at(LoopConfig, names[2:])
    if names[:2] == ["data", "sources"] and len(names) > 3:
        return kind_at(RecordSource, names[3:])
    return kind_at(LoopConfig, names)


def _value(kind: Any, text: str) -> Any:
    """Return the value that an argument means. ValueError if it is not of Hydra's grammar and no text is expected."""
    written = as_written(kind, text)
    if written is not None:
        if "${" in text and not REFERENCE.search(text):
            raise ValueError("expected ${KEY}, a reference to another key, but it is not closed")
        return unquoted(written) if isinstance(written, str) else written  # Hydra's users are used to quotes
    text = unquoted(text) if bare(kind) in (bool, float, int) else text
    try:
        parsed = OverridesParser.create().parse_override(f"key={text}")
        if not parsed.is_sweep_override():
            return parsed.value()
    except (HydraException, RecognitionException):
        if text.lstrip().startswith(("[", "{")):
            raise ValueError("cannot be read: expected [a,b] or {key:value}, with quotes around odd words") from None
    if bare(kind) is not Any:
        raise ValueError("cannot be read: expected a single value")
    return text
