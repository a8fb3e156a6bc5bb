"""``key=value`` command lines of the small programs: a dataclass says which keys there are, of what type, and defaults.

Values are taken as written (a folder called ``2024_01`` is no number). Settings inside a named group are dotted,
``sources.NAME.format=jsonl``; a list is ``[a,b]`` or its only item. A fault is an error of one line that names the key;
secrets are refused as the loop refuses them.
"""

import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vargpt_rl.common.secret_check import check_secrets

Command = TypeVar("Command")


def _type_of(kind: Any, names: list[str]) -> Any:
    """The type of a dotted key. ValueError where there is no such key."""
    for name in names:
        if is_dataclass(kind):
            keys = [field.name for field in fields(kind)]
            if name not in keys:
                raise ValueError(f"expected key=value, where the key is one of {', '.join(keys)}")
            kind = get_type_hints(kind)[name]
        elif get_origin(kind) is dict and name:
            kind = get_args(kind)[1]
        else:
            raise ValueError(f"there is no key {name!r} below {kind}")
    return kind


def _value(kind: Any, text: str) -> str | list[str]:
    text = text.replace("${", r"\${")  # as written: no reference to another key
    if get_origin(kind) is not list:
        return text
    inside = text[1:-1] if text.startswith("[") and text.endswith("]") else None
    return [text] if inside is None else [item.strip() for item in inside.split(",") if item.strip()]


def load_command(kind: type[Command], arguments: list[str]) -> Command:
    """An instance of the dataclass; fields without a default must be given. ValueError for whatever is wrong."""
    settings, given = OmegaConf.structured(kind), set()
    for argument in arguments:
        key, equals, value = argument.partition("=")
        check_secrets(value, key)  # before an error repeats one
        names = key.split(".") if equals else [""]
        try:
            nested: Any = _value(_type_of(kind, names), value)
            for name in reversed(names):
                nested = {name: nested}
            settings = OmegaConf.merge(settings, nested)
        except (OmegaConfBaseException, ValueError) as error:
            raise ValueError(f"{argument}: {str(error).splitlines()[0]}") from error
        if key in given:
            raise ValueError(f"{argument}: {key} is given twice")
        given.add(key)
    missing = sorted(OmegaConf.missing_keys(settings))
    if missing:
        raise ValueError(f"{missing[0]} is not given: expected {missing[0]}=value")
    return OmegaConf.to_object(settings)


def run_command(kind: type[Command], execute: Callable[[Command], None], arguments: list[str] | None = None) -> int:
    """Run a program with ``sys.argv`` or other arguments; its exit code: 0 done, 2 an argument or input is wrong."""
    try:
        execute(load_command(kind, sys.argv[1:] if arguments is None else arguments))
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
