"""Ranges in the types of settings, the nearest key, and values as they are written."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vargpt_rl.common.settings import (
    Between,
    Count,
    Either,
    FolderName,
    MultipleOf,
    OneLine,
    OneOf,
    Positive,
    as_written,
    changed,
    check_ranges,
    expectations,
    kind_at,
    parse,
    split_list,
)


@dataclass
class Oven:
    degrees: Annotated[int, Between(50, 250)] = 180
    minutes: Positive | None = None
    mode: Annotated[str, OneOf("fan", "grill")] = "fan"
    volume: float = 1.0
    light: bool = False


@dataclass
class Kitchen:
    oven: Oven = field(default_factory=Oven)
    spares: dict[str, Oven] = field(default_factory=dict)
    plates: list[Annotated[int, MultipleOf(2)]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    timer: Annotated[int | str, Either(Between(1), OneOf("auto"))] = 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"oven": {"degrees": 20}}, "at: oven.degrees=20: expected 50 to 250"),
        ({"oven": {"minutes": 0}}, "at: oven.minutes=0.0: expected a number above 0"),
        ({"oven": {"minutes": math.nan}}, "at: oven.minutes=nan: expected a number above 0"),
        ({"oven": {"minutes": math.inf}}, "at: oven.minutes=inf: expected a number above 0"),
        ({"oven": {"volume": -math.inf}}, "at: oven.volume=-inf: expected a finite number"),
        ({"extra": {"free": math.inf}}, "at: extra.free=inf: expected a finite number"),
        ({"oven": {"volume": 1e300}}, "at: oven.volume=1e+300: expected 0 or a number between 1.2e-38 and 3.4e+38"),
        ({"oven": {"volume": -1e-300}}, "at: oven.volume=-1e-300: expected 0 or a number between 1.2e-38 and 3.4e+38"),
        ({"spares": {"../up": {}}}, "at: spares.../up: expected a plain folder name of at most 200 bytes, not a path"),
        ({"spares": {"/x": {}}}, "at: spares./x: expected a plain folder name of at most 200 bytes, not a path"),
        ({"timer": 2**32}, "at: timer=4294967296: expected a whole number below 4294967296"),
        ({"oven": {"light": 2}}, "at: 2 for oven.light: expected true or false"),
        ({"oven": {"light": -0.5}}, "at: -0.5 for oven.light: expected true or false"),
        ({"timer": 0}, "at: timer=0: expected 1 or more or auto"),
        ({"timer": "late"}, "at: timer=late: expected 1 or more or auto"),
        ({"oven": {"mode": "fam"}}, "at: oven.mode=fam: expected one of fan, grill"),
        ({"spares": {"old": {"degrees": 300}}}, "at: spares.old.degrees=300: expected 50 to 250"),
        ({"plates": [2, 3]}, "at: plates=[2, 3]: 3: expected a positive multiple of 2"),
        ({"oven": {"degres": 1}}, "at: there is no key oven.degres, did you mean oven.degrees?"),
        ({"degrees": 1}, "at: there is no key degrees, did you mean oven.degrees?"),
        ({"sink": 1}, "at: there is no key sink, expected one of oven, spares, plates, notes, extra, timer"),
        ({"oven": {"degrees": {"top": 1}}}, "at: there is no key 'top' below oven.degrees"),
        ({"oven": {"degrees": "hot"}}, "at: Value 'hot' of type 'str' could not be converted to Integer"),
    ],
)
def test_bad_values_are_named_with_their_range(values, message):
    for read in (partial(parse, Kitchen), partial(changed, Kitchen())):
        with pytest.raises(ValueError) as error:
            read(values, "at")
        assert str(error.value) == message


def test_right_values_make_the_object():
    found = parse(Kitchen, {"oven": {"minutes": 3}, "plates": [2], "extra": {"free": 3}}, "at")
    assert (found.oven.minutes, found.plates, found.extra) == (3.0, [2], {"free": 3})
    check_ranges(Oven, Oven(minutes=None))


@pytest.mark.parametrize("values", [{"oven": {"degrees": 200}}, {"oven": {"degrees": 200}, "timer": 2}, {}])
def test_changed_settings_are_a_copy_with_other_values(values):
    base = Kitchen(oven=Oven(minutes=3.0), plates=[2])
    found = changed(base, values, "at")
    assert found.oven == Oven(degrees=200 if values else 180, minutes=3.0)
    assert (found.plates, found.timer) == ([2], values.get("timer", 1))
    found.plates.append(4)
    found.oven.minutes = 1.0
    assert base == Kitchen(oven=Oven(minutes=3.0), plates=[2])


@given(st.floats(), st.floats(), st.booleans(), st.booleans(), st.floats())
def test_ranges_hold_what_they_say(low, high, closed, ended, value):
    inside = (value >= low if closed else value > low) and (value <= high if ended else value < high)
    assert (value in Between(low, high, closed, ended)) == inside


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "/a", "a\\b", "a\nb", " a", "a\0", "x" * 201, "李" * 67]
)
def test_paths_are_no_folder_names(name):
    assert name not in FolderName()


@pytest.mark.parametrize("name", ["a", "2024_01", ".a", "a b", "a=b", "李明", "it's", "a..b", "x" * 200])
def test_words_are_folder_names(name):
    assert name in FolderName()


@pytest.mark.parametrize(
    "text", ["", " ", "\u3000", "a\nb", "a\0", "\t", "\x1b[31m", "a\x85b", "\ud800", "x" * 4096, "李" * 1366]
)
def test_blank_and_broken_texts_are_no_line(text):
    assert text not in OneLine()


@pytest.mark.parametrize(
    "text", ["a", " a", "/a b/李明", "a\u3000b", "a\u200db", "~", "x" * 4095, "file (1).jsonl", "%s", "${x"]
)
def test_paths_are_lines(text):
    assert text in OneLine()


def test_flags_and_free_options_of_any_size_are_taken():
    made = parse(Kitchen, {"oven": {"light": 1}, "extra": {"bytes": 10**12, "tiny": 1e-300, "on": 5}}, "at")
    assert made.oven.light is True and made.extra == {"bytes": 10**12, "tiny": 1e-300, "on": 5}


def test_ranges_of_a_field_can_be_read():
    assert [str(expected) for expected in expectations(kind_at(Kitchen, ["oven", "minutes"]))] == ["a number above 0"]
    assert [str(expected) for expected in expectations(kind_at(Kitchen, ["oven", "volume"]))] == []
    assert [str(expected) for expected in expectations(Count)] == ["1 or more"]


@given(st.text())
def test_texts_are_taken_as_written(text):
    assert as_written(str, text) == text
    assert as_written(str | None, text) == (None if text == "null" else text)
    assert as_written(int, text) is None


@given(
    st.lists(
        st.text(
            st.characters(blacklist_characters=",'\" \t\n\r\x0b\x0c", blacklist_categories=("Zs", "Cc", "Zl", "Zp")),
            min_size=1,
        )
    )
)
def test_lists_are_split_at_commas(items):
    assert split_list(f"[{','.join(items)}]") == items
    assert split_list("[" + ", ".join(f"'{item},'" for item in items) + "]") == [f"{item}," for item in items]
