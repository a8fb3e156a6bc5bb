"""The layout of the source tree: the order of its rooms, and names that occur once."""

from pathlib import Path

import pytest

from tests.conftest import MARKS
from tests.helpers.layout import (
    forbidden_imports,
    import_circle,
    read_imports,
    read_tree,
    repeated_classes,
    room_of,
    shadowing_modules,
    upward_imports,
)

ROOT = Path(__file__).parents[1]
# From top to bottom. A room imports only rooms that are listed below it.
COMMANDS = (
    "vargpt_rl.__main__",
    "vargpt_rl.cli",
    "slurm",
    "vargpt_rl.simulate",
    "vargpt_rl.bench",
    "vargpt_rl.launch",
    "vargpt_rl.loop",
    "vargpt_rl.generate",
    "vargpt_rl.chat",
    "vargpt_rl.assemble",
    "vargpt_rl.convert",
    "vargpt_rl.doctor",
)
ROOMS = (
    *COMMANDS,
    "vargpt_rl.driver",
    "vargpt_rl.page",
    "vargpt_rl.memory",
    "configs",
    "rewards",
    "vargpt_rl.evaluate",
    "learners",
    "actors",
    "vargpt_rl.text",
    "vargpt_rl.inference",
    "vargpt_rl.release",
    "vargpt_rl.data",
    "vargpt_rl.stages",
    "vargpt_rl.losses",
    "vargpt_rl.storage",
    "vargpt_rl.model",
    "vargpt_rl.common",
)
PACKAGES = ("vargpt_rl", "actors", "learners", "rewards", "configs", "slurm")
READS_CONFIGS = (*COMMANDS, "vargpt_rl.driver", "vargpt_rl.memory", "configs")
MAX_LOOSE_MODULES = 8


@pytest.fixture(scope="module")
def tree():
    """The source and the tests."""
    return read_tree(ROOT, [*PACKAGES, "tests"])


@pytest.fixture(scope="module")
def source(tree):
    return {path: parsed for path, parsed in tree.items() if path.parts[0] in PACKAGES}


@pytest.fixture(scope="module")
def imports(source):
    return read_imports(source)


@pytest.fixture
def small_tree(tmp_path):
    """A tree of three rooms, top to bottom: app, middle, base."""

    def build(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / "__init__.py").touch()
            path.write_text(text)
        return read_tree(tmp_path, ["app", "middle", "base"])

    return build


def lines(found):
    return "\n".join(map(str, found))


def test_imports_point_down(imports):
    upward = upward_imports(imports, ROOMS)
    assert not upward, "imports of a higher room:\n" + lines(upward)


def test_every_module_is_in_a_room(imports):
    outside = {x.importer for x in imports if room_of(x.importer, ROOMS) is None}
    assert not outside, f"no room holds {sorted(outside)}; add one to ROOMS"


def test_no_import_circles(imports):
    circle = import_circle(imports)
    assert not circle, " -> ".join(circle)


def test_actors_only_act(imports):
    forbidden = forbidden_imports(imports, ["actors"], ["vargpt_rl.evaluate", "rewards", "learners"])
    assert not forbidden, lines(forbidden)


def test_only_the_upper_rooms_read_configs(imports):
    others = [room for room in ROOMS if room not in READS_CONFIGS]
    forbidden = forbidden_imports(imports, others, ["configs"])
    assert not forbidden, lines(forbidden)


def test_few_loose_modules():
    loose = sorted(path.name for path in (ROOT / "vargpt_rl").glob("*.py") if not path.name.startswith("__"))
    assert len(loose) <= MAX_LOOSE_MODULES, f"at most {MAX_LOOSE_MODULES} modules outside rooms: {loose}"


def test_marked_test_files_exist():
    gone = [place for places in MARKS.values() for place in places if not (ROOT / "tests" / place).exists()]
    assert not gone, f"tests/conftest.py marks {gone}"


def test_class_names_are_unique(tree):
    repeated = repeated_classes(tree)
    assert not repeated, lines(f"{name}: {', '.join(places)}" for name, places in repeated.items())


def test_no_module_shadows_a_library(source):
    assert not shadowing_modules(source, [*PACKAGES, "tests"])


@pytest.mark.parametrize(
    "statement",
    [
        "import app.main",
        "from app import main",
        "from app.main import run",
        "from app.main import *",
        "from ..app import main",
        "def late():\n    from app.main import run",
    ],
)
def test_checker_finds_an_upward_import(small_tree, statement):
    tree = small_tree({"app/main.py": "import middle.part", "middle/part.py": "import os\n" + statement})
    (upward,) = upward_imports(read_imports(tree), ["app", "middle", "base"])
    line = 1 + len(statement.splitlines())
    assert str(upward) == f"middle/part.py:{line}: middle.part imports app.main"


def test_checker_accepts_downward_imports(small_tree):
    tree = small_tree(
        {"app/main.py": "import middle.part\nfrom base import low", "middle/part.py": "", "base/low.py": ""}
    )
    imports = read_imports(tree)
    assert len(imports) == 2
    assert not upward_imports(imports, ["app", "middle", "base"])
    assert not import_circle(imports)


def test_checker_finds_a_circle_inside_a_room(small_tree):
    tree = small_tree(
        {"base/a.py": "from base import b", "base/b.py": "def f():\n    import base.c", "base/c.py": "import base.a"}
    )
    assert import_circle(read_imports(tree)) == ["base.a", "base.b", "base.c", "base.a"]


def test_checker_ignores_imports_for_types_in_circles(small_tree):
    b = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import base.a"
    tree = small_tree({"base/a.py": "import base.b", "base/b.py": b})
    assert not import_circle(read_imports(tree))


def test_checker_finds_forbidden_imports(small_tree):
    tree = small_tree({"app/main.py": "from base.low import x", "base/low.py": "x = 1", "middle/part.py": ""})
    imports = read_imports(tree)
    assert lines(forbidden_imports(imports, ["app"], ["base"])) == "app/main.py:1: app.main imports base.low"
    assert not forbidden_imports(imports, ["middle"], ["base"])


def test_checker_finds_repeated_and_shadowing_names(small_tree):
    tree = small_tree(
        {"app/main.py": "class A: pass", "base/low.py": "def f():\n    class A: pass", "base/json.py": ""}
    )
    assert repeated_classes(tree) == {"A": ["app/main.py:1", "base/low.py:2"]}
    assert shadowing_modules(tree, []) == [Path("base/json.py")]
