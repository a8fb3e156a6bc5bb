"""``key=value`` command lines of the small programs: a dataclass says which keys there are, of what type, and defaults.

Values are taken as written (a folder called ``2024_01`` is no number); those of lists are ``[A,B]``, each item as
written too. A fault is an error of one line that names the key.
"""

import sys
from collections.abc import Callable
from dataclasses import fields
from typing import TypeVar, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

Command = TypeVar("Command")


def load_command(kind: type[Command], arguments: list[str]) -> Command:
    """An instance of the dataclass; fields without a default must be given. ValueError for whatever is wrong."""
    keys = [field.name for field in fields(kind)]
    lists = [key for key, hint in get_type_hints(kind).items() if get_origin(hint) is list]
    given: dict[str, str] = {}
    values: dict[str, str | list[str]] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in keys:
            raise ValueError(f"{argument}: expected key=value, where the key is one of {', '.join(keys)}")
        if key in given:
            raise ValueError(f"{argument}: {key} is given twice")
        given[key] = value
        value = value.replace("${", r"\${")  # as written: no reference to another key
        values[key] = _items(argument, value) if key in lists else value
    try:
        settings = OmegaConf.merge(OmegaConf.structured(kind), values)
        missing = sorted(OmegaConf.missing_keys(settings))
        if missing:
            raise ValueError(f"{missing[0]} is not given: expected {missing[0]}=value")
        return OmegaConf.to_object(settings)
    except OmegaConfBaseException as error:
        key = error.full_key.partition("[")[0]  # of a list's item
        raise ValueError(f"{key}={given[key]}: {str(error).splitlines()[0]}") from error


def _items(argument: str, value: str) -> list[str]:
    if not (value.startswith("[") and value.endswith("]")):
        raise ValueError(f"{argument}: expected a list, [A,B]")
    return [item.strip() for item in value[1:-1].split(",") if item.strip()]


def run_command(kind: type[Command], execute: Callable[[Command], None], arguments: list[str] | None = None) -> int:
    """Run a program with ``sys.argv`` or other arguments; its exit code: 0 done, 2 an argument or input is wrong."""
    try:
        execute(load_command(kind, sys.argv[1:] if arguments is None else arguments))
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
