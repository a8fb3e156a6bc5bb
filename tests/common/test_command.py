"""Command lines: values as written, and errors of one line that name the key."""

import enum
import importlib
import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vargpt_rl.common.command import load_command, run_command


class Kind(enum.Enum):
    one = "one"
    two = "two"


@dataclass
class Copy:
    source: str
    target: Path
    kind: Kind = Kind.one
    seed: int = 0
    scale: float = 1.0
    quiet: bool = False

    def __post_init__(self):
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: expected 0 or more")


@dataclass
class Pile:
    files: list[str] = field(default_factory=list)
    height: int = 1


@dataclass
class Piles:
    piles: dict[str, Pile] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)


def test_values_have_the_types_of_the_fields():
    command = load_command(Copy, ["source=2024_01", "target=a=b/c", "kind=two", "seed=3", "scale=1e-3", "quiet=true"])
    assert command == Copy("2024_01", Path("a=b/c"), Kind.two, 3, 1e-3, True)


@given(st.text(st.characters(blacklist_characters="?\\", blacklist_categories=("Cs",)), min_size=1))
def test_strings_are_taken_as_written(text):
    assert load_command(Copy, [f"source={text}", "target=t"]).source == text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["target=b"], "source is not given"),
        (["source=a", "target=b", "sed=1"], "sed=1"),
        (["source=a", "target=b", "seed"], "seed: expected key=value"),
        (["source=a", "target=b", "seed=high"], "seed=high"),
        (["source=a", "target=b", "seed=-1"], "seed=-1"),
        (["source=a", "target=b", "seed=1", "seed=2"], "seed is given twice"),
        (["source=a", "target=b", "kind=three"], "kind=three"),
        (["source=a", "target=b", "source.x=three"], "source.x=three"),
    ],
)
def test_faults_are_one_line_that_names_the_key(arguments, named, capsys):
    assert run_command(Copy, lambda command: None, arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and named in message and message.count("\n") == 1


def test_named_groups_are_dotted_and_lists_are_in_brackets():
    arguments = ["piles.a.files=[x y.json, ${b}]", "piles.b.files=x,[y]", "piles.b.height=2", "order=[2,1]"]
    expected = {"a": Pile(["x y.json", "${b}"], 1), "b": Pile(["x,[y]"], 2)}
    assert load_command(Piles, arguments) == Piles(expected, [2, 1])
    assert load_command(Piles, ["piles.a.files=[]", "order=7"]) == Piles({"a": Pile([])}, [7])


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("piles.a.hight=2", "there is no key piles.a.hight, did you mean piles.a.height?"),
        ("piles.a.height=high", "could not be converted to Integer"),
        ("piles.a.height.of=2", "there is no key 'of' below"),
        ("piles..height=2", "there is no key '' below"),
        ("piles=a", "piles=a: "),
        ("piles.a=b", "piles.a=b: "),
        ("order=[1,x]", "'x' of type 'str' could not be converted to Integer"),
    ],
)
def test_faults_in_groups_and_lists_name_the_key(argument, expected):
    with pytest.raises(ValueError, match="^.*$") as error:
        load_command(Piles, [argument])
    assert str(error.value).startswith(f"{argument}: ") and expected in str(error.value)


def test_a_program_that_ends_well_has_code_0():
    seen = []
    assert run_command(Copy, seen.append, ["source=a", "target=b"]) == 0
    assert seen == [Copy("a", Path("b"))]


PROGRAMS = [
    "rewards.serve",
    "rewards.testing",
    "vargpt_rl.assemble",
    "vargpt_rl.bench.ablations",
    "vargpt_rl.bench.adapters",
    "vargpt_rl.bench.alignment",
    "vargpt_rl.bench.gpu",
    "vargpt_rl.bench.model",
    "vargpt_rl.bench.rewards",
    "vargpt_rl.chat",
    "vargpt_rl.convert",
    "vargpt_rl.data.encode",
    "vargpt_rl.data.instruct",
    "vargpt_rl.data.preferences",
    "vargpt_rl.data.prompts",
    "vargpt_rl.doctor",
    "vargpt_rl.evaluate",
    "vargpt_rl.generate",
    "vargpt_rl.launch",
    "vargpt_rl.loop",
    "vargpt_rl.page",
    "vargpt_rl.page.watch",
    "vargpt_rl.simulate",
    "vargpt_rl.simulate.measure",
]


@pytest.mark.parametrize("asked", ["--help", "-h"])
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_each_program_says_how_it_is_used(name, asked, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, asked])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    said = capsys.readouterr()
    assert end.value.code == 0 and said.err == ""
    assert said.out.startswith("usage: ") and name in said.out


def test_help_explains_the_keys(capsys):
    assert importlib.import_module("vargpt_rl.data.prompts").main(["limit=1", "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: python -m vargpt_rl.data.prompts [key=value ...]")
    assert "max_bad_fraction=0.01" in said and "Fraction of the rows" in said
