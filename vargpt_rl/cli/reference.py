"""The reference of a run's keys, from the settings classes themselves: types, defaults, ranges and docstrings."""

import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from configs.load import load_config
from configs.schema import LoopConfig
from vargpt_rl.common.fields import ClassPath, class_doc, class_fields
from vargpt_rl.common.settings import bare, expectations, field_types

WIDTH = 100


@dataclass(frozen=True)
class Key:
    """A key of a run, or a group of keys, whose name ends with a dot."""

    name: str
    kind: str
    default: str
    expected: str
    doc: str

    @property
    def is_group(self) -> bool:
        """Tell whether this is a group."""
        return self.name.endswith(".")


def keys_of_a_run() -> list[Key]:
    """Return all keys of a run, with the defaults of ``configs/loop.yaml``."""
    return list(_keys(LoopConfig, load_config([]), ""))


def _keys(kind: Any, values: Any, prefix: str) -> Iterator[Key]:
    sources = class_fields(ClassPath(kind.__module__, kind.__name__))
    for name, of_field in field_types(kind).items():
        inner: Any = bare(of_field)
        doc = sources[name].doc
        value = getattr(values, name)
        if sources[name].group is not None:
            own = class_doc(ClassPath(inner.__module__, inner.__name__))
            yield Key(f"{prefix}{name}.", "", "", "", doc or own)
            yield from _keys(inner, value, f"{prefix}{name}.")
        else:
            expected = "; ".join(dict.fromkeys(map(str, expectations(of_field))))
            yield Key(f"{prefix}{name}", type_name(of_field), as_typed(value), expected, doc)


def type_name(kind: Any) -> str:
    """Return a type as a user would say it: ``int``, ``list of float``, ``str or null``."""
    inner: Any = bare(kind)
    names: dict[Any, str] = {list: "list", dict: "dictionary", Any: "any"}
    found = names.get(inner) or str(getattr(inner, "__name__", inner))
    arguments = get_args(inner)
    if get_origin(inner) is UnionType:
        found = " or ".join(map(type_name, arguments))
    elif arguments and get_origin(inner) is list:
        found = f"list of {type_name(arguments[0])}"
    elif arguments and get_origin(inner) is dict:
        found = "dictionary"
    return f"{found} or null" if NoneType in get_args(kind) else found


def as_typed(value: Any) -> str:
    """Return a value as it is given after ``key=``."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    return str(json.dumps(value, default=str)).replace('"', "")


def matching(keys: list[Key], prefix: str | None) -> list[Key]:
    """Return the keys with a prefix; if there are none, those that have it as a word in name or explanation."""
    if prefix is None:
        return keys
    below = [key for key in keys if key.name == prefix or key.name.startswith(f"{prefix.rstrip('.')}.")]
    begun = below or [key for key in keys if key.name.startswith(prefix)]
    return begun or [key for key in keys if prefix.lower() in f"{key.name} {key.doc}".lower()]


def as_text(keys: list[Key]) -> str:
    """Return the keys for a terminal."""
    lines = []
    for key in keys:
        if key.is_group:
            lines += ["", f"{key.name}*"]
        else:
            expected = f", {key.expected}" if key.expected else ""
            lines.append(f"{key.name}={key.default}   ({key.kind}{expected})")
        for paragraph in key.doc.split("\n\n"):
            lines += textwrap.wrap(" ".join(paragraph.split()), WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines).lstrip("\n") + "\n"


def as_markdown(keys: list[Key]) -> str:
    """Return the keys as a page with a table for each group."""
    lines = [
        "# Keys of a run",
        "",
        "Written by `vargpt-rl config keys --markdown`. Settings are `key=value`; defaults are those of the demo.",
    ]
    open_table = False
    groups = [Key("", "", "", "", ""), *keys] if keys and not keys[0].is_group else keys
    for key in groups:
        if key.is_group or not key.name:
            lines += ["", f"## {key.name.rstrip('.') or 'General'}", *(["", key.doc] if key.doc else [])]
            open_table = False
            continue
        if not open_table:
            lines += ["", "| Key | Default | Values | Meaning |", "| --- | --- | --- | --- |"]
            open_table = True
        values = f"{key.kind}: {key.expected}" if key.expected else key.kind
        cells = (f"`{key.name}`", f"`{key.default}`" if key.default else "", values, " ".join(key.doc.split()))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
