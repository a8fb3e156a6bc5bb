"""Settings as annotated dataclasses: the range of a field stands in its type, and one check reads it there.

    steps: Annotated[int, at_least(1)] = 100
    schedule: Annotated[str, OneOf("linear", "cosine")] = "cosine"

Numbers are everywhere of a size that fits: whole ones below 2^32, others within float32, which is what trains with
them. `build` makes the object: it refuses the first value outside its range, by its dotted key, before any
``__post_init__`` compares one field with another. Other annotations than `Expected` are ignored.
"""

import difflib
import math
import re
import types
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

from vargpt_rl.common.errors import first_line

if TYPE_CHECKING:  # at run time where it is used: ranges need no OmegaConf, and `vargpt_rl.bench.gpu` has none
    from _typeshed import DataclassInstance
    from omegaconf import DictConfig

SMALLEST, LARGEST = 1.2e-38, 3.4e38
"""Of normal numbers in float32."""
Settings = TypeVar("Settings")
Group = TypeVar("Group", bound="DataclassInstance")
Value = TypeVar("Value")


@runtime_checkable
class Expected(Protocol):
    """Values that a field may have. ``str`` completes "expected ..."."""

    def __contains__(self, value: Any, /) -> bool: ...


@dataclass(frozen=True)
class Between:
    """Numbers from ``low`` to ``high``, with or without the ends."""

    low: float = -math.inf
    high: float = math.inf
    includes_low: bool = True
    includes_high: bool = True

    def __contains__(self, value: float, /) -> bool:
        if not _is_number(value):
            return False
        above = value >= self.low if self.includes_low else value > self.low
        return above and (value <= self.high if self.includes_high else value < self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{self.low:g} or more" if self.includes_low else f"a number above {self.low:g}"
        if self.includes_low and self.includes_high:
            return f"{self.low:g} to {self.high:g}"
        low = f"{self.low:g} or more" if self.includes_low else f"above {self.low:g}"
        return f"{low} and {'at most' if self.includes_high else 'less than'} {self.high:g}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def at_least(low: float) -> Between:
    """Numbers of ``low`` or more."""
    return Between(low)


def above(low: float) -> Between:
    """Numbers greater than ``low``."""
    return Between(low, includes_low=False)


class OneOf:
    """One of some values."""

    def __init__(self, *choices: str | int):
        self.choices = choices

    def __contains__(self, value: object, /) -> bool:
        return value in self.choices

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.choices))}"


class Either:
    """Values of any of several ranges, such as a count or a word."""

    def __init__(self, *ranges: Expected):
        self.ranges = ranges

    def __contains__(self, value: object, /) -> bool:
        return any(value in expected for expected in self.ranges)

    def __str__(self) -> str:
        return " or ".join(str(expected).removeprefix("one of ") for expected in self.ranges)


@dataclass(frozen=True)
class MultipleOf:
    """Positive multiples of ``step``."""

    step: int

    def __contains__(self, value: int, /) -> bool:
        return _is_number(value) and value > 0 and value % self.step == 0

    def __str__(self) -> str:
        return f"a positive multiple of {self.step}"


@dataclass(frozen=True)
class FolderName:
    """Names of one folder in another."""

    longest: int = 200
    """Bytes in UTF-8; file systems allow 255, and temporary names are longer."""

    def __contains__(self, value: str, /) -> bool:
        plain = value.isprintable() and value.strip() == value and not set(value) & set("/\\")
        return plain and value not in ("", ".", "..") and len(value.encode()) <= self.longest

    def __str__(self) -> str:
        return f"a plain folder name of at most {self.longest} bytes, not a path"


@dataclass(frozen=True)
class OneLine:
    """Texts of one line that are not blank, such as paths and names of columns."""

    longest: int = 4095
    """Bytes in UTF-8; no path is longer on Linux."""
    or_empty: bool = False
    """Whether "" is taken too, for a value that is given later."""

    def __contains__(self, value: str, /) -> bool:
        if self.or_empty and value == "":
            return True
        plain = not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value)
        return plain and bool(value.strip()) and len(value.encode()) <= self.longest

    def __str__(self) -> str:
        return "a line of text that is not blank"


Line = Annotated[str, OneLine()]
"""A line of text."""
Count = Annotated[int, at_least(1)]
"""1 or more."""
CountOrNone = Annotated[int, at_least(0)]
"""0 or more."""
Positive = Annotated[float, above(0)]
"""A number above 0."""
NotNegative = Annotated[float, at_least(0)]
"""A number of 0 or more."""
Share = Annotated[float, Between(0, 1)]
"""A number from 0 to 1."""
LearningRate = Annotated[float, Between(0, 1, includes_low=False)]
"""A peak learning rate."""
SECONDS = Between(0, 7 * 24 * 3600, includes_low=False)
"""Times to wait: up to a week, beyond which the system's own waits overflow."""
Seconds = Annotated[float, SECONDS]
"""A time to wait."""


def bare(kind: Any) -> Any:
    """Return a field's type without annotations and without None."""
    if get_origin(kind) is Annotated:
        return bare(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        others = [other for other in get_args(kind) if other is not type(None)]
        return bare(others[0]) if len(others) == 1 else kind
    return kind


def field_types(kind: Any) -> Mapping[str, Any]:
    """Return the annotated types of a dataclass's fields by name."""
    return _field_types(kind)


@cache
def _field_types(kind: Any) -> Mapping[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def check_ranges(kind: Any, value: Any, key: str = "", whole: Any = None) -> None:
    """Raise ValueError naming the key of the first value outside the range of its type.

    ``value`` is a dataclass object or plain data (dicts and lists). ``whole`` is the list that it is an item of.
    """
    if value is None or value == "???":  # given later
        return
    inner = bare(kind)
    if is_dataclass(inner) or get_origin(inner) in (dict, list):
        for part in _parts(inner, value, key):
            check_ranges(*part)
        return
    finite = not isinstance(value, float) or math.isfinite(value)
    outside = [str(expected) for expected in expectations(kind) if not finite or value not in expected]
    if told := outside[:1] or _size_fault(value, inner is Any):
        item = f"{value}"[:200] if whole is None else f"{whole}: {value}"[:200]
        raise ValueError(f"{key}={item}: expected {told[0]}")


def _size_fault(value: Any, is_free: bool) -> list[str]:
    """Return what is expected of a number of another size, if it is one; free options may be of any finite size."""
    if isinstance(value, float) and not math.isfinite(value):
        return ["a finite number"]
    if is_free:
        return []
    if isinstance(value, float) and value and not SMALLEST <= abs(value) <= LARGEST:
        return [f"0 or a number between {SMALLEST:g} and {LARGEST:g}"]
    if isinstance(value, int) and not -(2**32) < value < 2**32:
        return [f"a whole number below {2**32}"]
    return []


def _parts(kind: Any, value: Any, key: str) -> Iterator[tuple[Any, Any, str, Any]]:
    """Yield the arguments of `check_ranges` for each part of a dataclass, dictionary or list."""
    if is_dataclass(kind):
        for name, of_field in field_types(kind).items():
            inside = value[name] if isinstance(value, Mapping) else getattr(value, name)
            yield of_field, inside, f"{key}.{name}".lstrip("."), None
    elif get_origin(kind) is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{key}={value}: expected {{KEY:VALUE,...}}")
        if is_dataclass(bare(get_args(kind)[1])):
            check_names(value, key)
        yield from ((get_args(kind)[1], inside, f"{key}.{name}".lstrip("."), None) for name, inside in value.items())
    else:
        if not isinstance(value, list):
            raise ValueError(f"{key}={value}: expected [VALUE,...]")
        yield from ((get_args(kind)[0], item, key, value) for item in value)


def check_names(groups: Mapping[str, Any], key: str) -> None:
    """Raise ValueError for a name of a group of settings that no folder can have: files are written under it."""
    for name in groups:
        if name not in FolderName():
            raise ValueError(f"{key}.{name}: expected {FolderName()}".replace("\n", " "))


def expectations(kind: Any) -> list[Any]:
    """Return the ranges in the type of a field, or in that of its items."""
    if get_origin(kind) in (Union, types.UnionType, list):
        return [expected for other in get_args(kind) for expected in expectations(other)]
    return [note for note in getattr(kind, "__metadata__", ()) if isinstance(note, Expected)]


def build(kind: type[Settings], config: "DictConfig", key: str = "") -> Settings:
    """Make the dataclass object of a config. ``key`` is where it stands in a larger one.

    Raises ValueError naming the key for a value outside its range.
    """
    from omegaconf import OmegaConf

    check_ranges(kind, OmegaConf.to_container(config, resolve=True), key)
    return OmegaConf.to_object(config)


def parse(kind: type[Settings], values: Mapping[str, Any], key: str) -> Settings:
    """Make a dataclass object of plain values, which replace the defaults.

    Raises ValueError, naming the key, for an unknown key or a bad value.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        check_keys(kind, values)
        return OmegaConf.to_object(_merged(kind, values))
    except (OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"{key}: {first_line(error)}") from error


def changed(base: Group, values: Mapping[str, Any], key: str) -> Group:
    """Return a copy of a dataclass object in which plain values replace its own. Raises ValueError as `parse` does."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    merged = merge(base, values, key)
    try:
        made = {name: OmegaConf.to_object(of) if OmegaConf.is_config(of) else of for name, of in merged.items()}
        return replace(deepcopy(base), **made)
    except (OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"{key}: {first_line(error)}") from error


def merge(base: "DataclassInstance", values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Check keys, types and ranges as `changed` does, without comparing fields with each other.

    Returns those fields of ``base`` that have values. Groups of settings without any are not read: that takes long.
    """
    from omegaconf.errors import OmegaConfBaseException

    try:
        check_keys(type(base), values)
        if all(is_dataclass(getattr(base, name)) and isinstance(inside, Mapping) for name, inside in values.items()):
            return {name: _merged(getattr(base, name), inside, name) for name, inside in values.items()}
        merged = _merged(base, values)
        return {name: merged[name] for name in values}
    except (OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"{key}: {first_line(error)}") from error


def _merged(base: Any, values: Mapping[str, Any], key: str = "") -> "DictConfig":
    """Put values into a dataclass object, or into the defaults of a class, and check their ranges."""
    from omegaconf import DictConfig, OmegaConf

    merged = OmegaConf.merge(OmegaConf.structured(base), values)
    assert isinstance(merged, DictConfig)
    check_ranges(base if isinstance(base, type) else type(base), OmegaConf.to_container(merged, resolve=True), key)
    return merged


def check_keys(kind: Any, values: object) -> None:
    """Raise ValueError for a key in nested plain values that ``kind`` does not have, with the nearest that it has.

    Also for a number where a flag is expected: OmegaConf takes any but 0 for true.
    """
    for names, value in _paths(values):
        if bare(kind_at(kind, names)) is bool and isinstance(value, int | float) and value not in (0, 1):
            raise ValueError(f"{value} for {'.'.join(names) or 'a flag'}: expected true or false")


def _paths(values: object, names: tuple[str, ...] = ()) -> Iterator[tuple[list[str], object]]:
    yield list(names), values
    if isinstance(values, Mapping):
        for name, inside in values.items():
            yield from _paths(inside, (*names, str(name)))


def kind_at(kind: Any, names: list[str]) -> Any:
    """Return the type of a dotted key. Raises ValueError, with the nearest keys, if there is none."""
    root = kind
    for count, name in enumerate(names):
        kind = bare(kind)
        if is_dataclass(kind):
            known = field_types(kind)
            if name not in known:
                raise ValueError(_nearest(root, list(known), names[:count], name))
            kind = known[name]
        elif get_origin(kind) is dict and name:
            kind = get_args(kind)[1]
        elif kind is Any and name:
            return Any
        else:
            raise ValueError(f"there is no key {name!r} below {'.'.join(names[:count]) or kind}")
    return kind


def _nearest(root: Any, known: list[str], before: list[str], name: str) -> str:
    """Say which key may have been meant: one of this group with a like name, or one elsewhere with the same name."""
    key = ".".join([*before, name])
    meant = [".".join([*before, like]) for like in difflib.get_close_matches(name, known, n=1)]
    namesakes = [other for other in dotted(root) if other.endswith(f".{name}")]
    meant += difflib.get_close_matches(key, namesakes, n=1, cutoff=0)
    if meant:
        return f"there is no key {key}, did you mean {meant[0]}?"
    return f"there is no key {key}, expected one of {', '.join(known)}"


def dotted(kind: Any, key: str = "") -> Iterator[str]:
    """Yield the dotted keys of a dataclass and of the dataclasses in it."""
    for name, of_field in field_types(kind).items():
        inner = f"{key}.{name}".lstrip(".")
        if is_dataclass(bare(of_field)):
            yield from dotted(bare(of_field), inner)
        else:
            yield inner


ITEM = re.compile(r"""\s*('[^']*'|"[^"]*"|[^,]*?)\s*(?:,|$)""")
"""An item of a list, with or without quotes."""


def as_written(kind: Any, text: str) -> str | list[str] | None:
    """Return the value of a text field, or of a list of texts in brackets, as it is written; None for other fields.

    An item of a list may be in quotes, if it has commas.
    """
    nullable = kind is not bare(kind) and type(None) in get_args(kind)
    inner = bare(kind)
    if inner is str:
        return None if nullable and text == "null" else text
    if get_origin(inner) is list and bare(get_args(inner)[0]) is str:
        return split_list(text)
    return None


def at_iteration(values: Sequence[Value], iteration: int) -> Value:
    """Return the value of an iteration in a list of one for each; iterations beyond the last repeat it."""
    return values[min(iteration, len(values) - 1)]


def split_list(text: str) -> list[str]:
    """Split ``[a,b]`` into its items; any other text is the only item."""
    if not (text.startswith("[") and text.endswith("]")):
        return [text]
    return [unquoted(item) for item in ITEM.findall(text[1:-1]) if item]


def unquoted(text: str) -> str:
    """Remove a pair of quotes around all of a text."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" and text[0] not in text[1:-1]
    return text[1:-1] if quoted else text
