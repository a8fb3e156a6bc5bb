"""The documentation: links, commands, settings and imports that exist."""

import ast
import importlib
import re
import runpy
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image
from typer.main import get_command

from configs.load import load_config
from vargpt_rl.cli.app import main, make_app
from vargpt_rl.model.hub import EMBEDDED

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
EVERYTHING = "\n".join(text for page, text in TEXTS.items() if page != "CHANGELOG.md")
COMMANDS = re.findall(r"^    (vargpt-rl (?:.*\\\n)*.+)", EVERYTHING, re.MULTILINE)
COMMANDS += re.findall(r"`(vargpt-rl [^`\n]+)`", EVERYTHING)
COMMANDS = sorted({line.replace("\\\n", " ").partition("  #")[0] for line in COMMANDS})
UNREAL = re.compile(r"DIR|FILE|PROMPT|KEY|PREFIX|winners|\.\.\.|runs/[AB]\b")
"""Words of examples that only a reader can fill in."""
QUICK = ("draw", "generate", "config", "env")
EXAMPLES = [line for line in COMMANDS if line.split()[1] in QUICK and line.split()[2:] and not UNREAL.search(line)]
MODULES = sorted(set(re.findall(r"python -m ((?:vargpt_rl|rewards|learners)[\w.]*)", EVERYTHING)))
PYTHON = re.findall(r"```python\n(.*?)```", EVERYTHING, re.DOTALL)
LOOPS = [line for line in COMMANDS if line.startswith("vargpt-rl run ") and not re.search(r"KEY|\.\.\.", line)]


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
    load_config([word for word in shlex.split(line) if "=" in word])


@pytest.mark.parametrize("line", COMMANDS)
def test_subcommands_exist(line):
    command = get_command(make_app())
    for word in shlex.split(line)[1:]:
        if not getattr(command, "commands", {}):
            break
        assert word in command.commands or word.startswith("--"), line
        command = command.commands.get(word)


@pytest.fixture
def examples_folder(tmp_path, monkeypatch):
    """A working directory with what the examples name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(EMBEDDED, tmp_path / "runs/demo/model")
    shutil.copytree(EMBEDDED, tmp_path / "runs/first/model")
    (tmp_path / "prompts.txt").write_text("a large red circle\n")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (128, 128), "red").save(tmp_path / "images/a-large-red-circle.png")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("line", EXAMPLES)
def test_quick_examples_run(line, examples_folder, capsys):
    assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_examples_run(code, examples_folder):
    (examples_folder / "example.py").write_text(code)
    runpy.run_path("example.py")


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
