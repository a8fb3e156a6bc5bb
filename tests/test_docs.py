"""The documentation: links, commands, settings and imports that exist."""

import ast
import importlib
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from configs.load import load_config

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
EVERYTHING = "\n".join(text for page, text in TEXTS.items() if page != "CHANGELOG.md")
MODULES = sorted(set(re.findall(r"python -m ((?:vargpt_rl|rewards|learners)[\w.]*)", EVERYTHING)))
PYTHON = re.findall(r"```python\n(.*?)```", EVERYTHING, re.DOTALL)
LOOPS = re.findall(r"^    \S*python -m vargpt_rl\.loop ((?:.*\\\n)*.+)", EVERYTHING, re.MULTILINE)
LOOPS = [line for line in LOOPS if "KEY=VALUE" not in line]


def anchors(text: str) -> set[str]:
    """The fragments by which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", TEXTS[page])
    for target, fragment in links:
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        assert not fragment or fragment in anchors(path.read_text(encoding="utf-8")), f"{target}#{fragment}"


@pytest.mark.parametrize("module", MODULES)
def test_commands_exist(module):
    assert find_spec(module), module
    if find_spec(module).submodule_search_locations:
        assert find_spec(f"{module}.__main__"), f"{module} is a package without __main__"


@pytest.mark.parametrize("line", LOOPS)
def test_loop_settings_are_known(line):
    load_config([word for word in shlex.split(line.replace("\\\n", " ")) if "=" in word])


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_examples_import_names_that_exist(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), node.module


@pytest.mark.parametrize("plugin", sorted(set(re.findall(r"(rewards\.\w+):(\w+)", EVERYTHING))))
def test_named_plugins_exist(plugin):
    module, name = plugin
    assert re.search(rf"^(?:class|def) {name}\b", Path(find_spec(module).origin).read_text(), re.MULTILINE)


def test_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 160
