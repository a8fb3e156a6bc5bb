"""The tree of subcommands: help without imports, examples, hints, exit codes."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from vargpt_rl.cli import configuration, images, pages, runs, tools
from vargpt_rl.cli.app import main, make_app
from vargpt_rl.cli.completion import LOOP
from vargpt_rl.cli.images import BENCHMARKS, split_prompts
from vargpt_rl.cli.programs import CONFIG_GROUPS, Program, class_path, dotted_fields, refuse_misspelt
from vargpt_rl.cli.runs import RUN

HEAVY = {"torch", "hydra", "omegaconf", "ray", "transformers", "numpy", "rich", "pandas"}
CHECK = """
import contextlib, io, json, sys, time
from vargpt_rl.cli.app import main
pages = {}
for words in json.loads(sys.argv[1]):
    page = io.StringIO()
    began = time.process_time()
    with contextlib.redirect_stdout(page):
        code = main([*words, "--help"])
    pages[" ".join(words)] = {"code": code, "page": page.getvalue(), "seconds": time.process_time() - began}
print(json.dumps({"pages": pages, "modules": sorted(sys.modules)}))
"""


def commands(group, words=()):
    """Yield the words of every command and group."""
    yield words, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*words, name))


COMMANDS = dict(commands(get_command(make_app())))


@pytest.fixture(scope="module")
def helped():
    """Help of every command, in a process of its own."""
    command = [sys.executable, "-c", CHECK, json.dumps([list(words) for words in COMMANDS])]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_help_imports_no_library(helped):
    assert not HEAVY & set(helped["modules"])


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_exists_and_is_quick(helped, words):
    found = helped["pages"][" ".join(words)]
    assert found["code"] == 0 and found["page"].startswith("Usage: vargpt-rl")
    assert found["seconds"] < 0.3


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_has_examples_of_the_command(helped, words):
    _, found, examples = helped["pages"][" ".join(words)]["page"].partition("Examples:")
    assert found and f"vargpt-rl {' '.join(words)}" in examples


def programs():
    """All programs of the command."""
    for module in (configuration, images, pages, runs, tools):
        for found in vars(module).values():
            yield from (each for each in (found if isinstance(found, tuple) else [found]) if isinstance(each, Program))


@pytest.mark.parametrize("program", list(programs()), ids=lambda program: program.name)
def test_examples_name_keys_that_exist(program):
    paths = [*program.settings, *([LOOP] if program.passes_on else [])]
    known = {key for path in paths for key, _ in dotted_fields(class_path(path))} | CONFIG_GROUPS
    keys = [word.partition("=")[0] for line in program.examples for word in shlex.split(line) if "=" in word]
    assert [key for key in keys if key not in known and not key.startswith("sources.")] == []


@pytest.mark.parametrize("words", [words for words, command in COMMANDS.items() if hasattr(command, "commands")])
def test_lists_of_commands_cut_no_summary(helped, words):
    listed = helped["pages"][" ".join(words)]["page"].partition("Commands:")[2].partition("Examples:")[0]
    assert listed and "..." not in listed


def test_help_fits_a_terminal(helped):
    assert max(map(len, helped["pages"][""]["page"].splitlines())) <= 100


def test_help_lists_keys_with_defaults_and_meaning(helped):
    page = " ".join(helped["pages"]["draw"]["page"].split())
    assert "images=1 Images per prompt." in page
    assert "dpo.* DPO on the pairs of the iteration." in " ".join(helped["pages"]["run"]["page"].split())


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["drwa"]) == 2
    assert "Did you mean 'draw'" in capsys.readouterr().err


def test_a_setting_without_a_command_names_the_command(capsys):
    assert main(["iterations=1"]) == 2
    assert "did you mean vargpt-rl run iterations=1?" in capsys.readouterr().err


def test_the_version_is_printed():
    assert CliRunner().invoke(make_app(), ["--version"]).stdout.startswith("vargpt-rl 0.")


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m vargpt_rl config keys | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.count("\n") == 1 and not done.stderr


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "vargpt_rl", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0 and done.stdout.startswith("vargpt-rl 0.")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "dpo.betta=1"], "did you mean dpo.beta?"),
        (["demo", "dpo.betta=1"], "did you mean dpo.beta?"),
        (["resume", "nowhere"], "nowhere: there is no run here"),
        (["draw", "a circle", "imags=3"], "did you mean images?"),
        (["eval", "shpes"], "shpes"),
        (["config", "show", "seed=x"], "seed=x"),
        (["config", "keys", "nothing_like_it"], "no key has this prefix or word"),
        (["model", "convert", "source=x"], "not given: expected"),
        (["reward", "test", "nowhere.py:x"], "nowhere.py"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_a_fault_is_one_line_and_exit_code_2(tmp_path, arguments, expected, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("make_outputs_lasting", "handle_signals"):
        monkeypatch.setattr(f"vargpt_rl.cli.runs.{name}", lambda: None)
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and len(told.splitlines()) == 1 and expected in told


MISSPELT = """
import sys
from vargpt_rl.cli.app import main
codes = [main(["run", "dpo.betta=1"]), main(["draw", "a circle", "imges=3"]), main(["eval", "shapes", "limt=3"])]
print(codes, [name for name in ("torch", "ray", "hydra") if name in sys.modules])
"""


def test_a_misspelt_key_is_refused_before_libraries_are_loaded():
    done = subprocess.run([sys.executable, "-c", MISSPELT], capture_output=True, text=True)
    told = done.stderr.splitlines()
    assert done.stdout.strip() == "[2, 2, 2] []" and len(told) == 3
    assert told[0] == "error: dpo.betta=1: there is no key dpo.betta, did you mean dpo.beta?"


@pytest.mark.parametrize(
    "setting",
    [
        "at.512.dpo.betta=1",
        "data.sources.mine.files=[a]",
        "+preference.options.share=0.5",
        "experiment=quick",
        "data=captioned",
        "resume=x",
        "~at",
        "dpo.recipe.steps=3",
    ],
)
def test_only_misspelt_keys_are_refused_early(setting):
    refuse_misspelt(RUN, [setting])


def test_a_secret_is_not_repeated_by_an_error(capsys):
    with pytest.raises(typer.Exit):
        refuse_misspelt(RUN, ["checkpoit=hf_" + "NotSeen" * 5])
    assert "NotSeen" not in capsys.readouterr().err


def test_prompts_are_told_from_settings():
    words = ["a circle", "images=2", "sign that says x=1", "f(x)=2", "seed=1"]
    assert split_prompts(words) == (["a circle", "sign that says x=1", "f(x)=2"], ["images=2", "seed=1"])


def test_benchmarks_are_those_of_the_program():
    from vargpt_rl.evaluate.settings import Benchmark

    assert list(BENCHMARKS) == [benchmark.value for benchmark in Benchmark]
