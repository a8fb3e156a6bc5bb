"""Subcommands that pass their ``key=value`` arguments to the program of a module."""

import difflib
import importlib
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from vargpt_rl.cli.completion import LOOP, complete_keys
from vargpt_rl.common.fields import (
    FieldSource,
    class_fields,
    class_path,
    config_groups,
    dotted_fields,
    key_shown,
    meaning,
)

CONFIG_GROUPS = config_groups().keys() | {"resume"}
"""Keys of a run that are no settings: groups of YAML files, and the folder of a run."""
KEY_COLUMNS = 22
"""Columns for a key with its default; the meaning of a longer one begins on the next line."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A subcommand: what help shows, and the module whose ``main`` takes its arguments."""

    name: str
    module: str
    summary: str
    examples: tuple[str, ...]
    settings: tuple[str, ...] = ()
    """Classes of its keys, ``module:Name``."""
    hidden: tuple[str, ...] = ()
    """Keys that the command gives by itself."""
    passes_on: bool = False
    """Other keys are those of a run."""

    @property
    def fields(self) -> dict[str, FieldSource]:
        """The keys of all classes."""
        found = {name: field for path in self.settings for name, field in class_fields(class_path(path)).items()}
        return {name: field for name, field in found.items() if name not in self.hidden}


def command_class(program: Program) -> type[TyperCommand]:
    """Return a command whose help ends with examples and keys, read only if help is asked for."""

    class ProgramCommand(TyperCommand):
        def get_short_help_str(self, limit: int = 0) -> str:
            """Return the first paragraph of the summary, which click would cut to one line."""
            return help_text(program.summary).partition("\n\n")[0]

        def format_epilog(self, ctx: Any, formatter: Any) -> None:
            with formatter.section("Examples"):
                for example in program.examples:
                    formatter.write(f"{'':{formatter.current_indent}}{example}\n")
            if not program.settings:
                return
            with formatter.section("Keys"):
                rows = [(key_shown(field), meaning(field)) for field in program.fields.values()]
                formatter.write_dl(rows, col_max=KEY_COLUMNS)
            if any(field.group for field in program.fields.values()):
                formatter.write_paragraph()
                formatter.write_text("vargpt-rl config keys [PREFIX] lists all keys with ranges and explanations.")

    return ProgramCommand


def help_text(summary: str) -> str:
    """Fold a summary as click wants it."""
    return textwrap.dedent(summary).strip()


def call(module: str, arguments: list[str]) -> None:
    """Run the ``main`` of a module and exit with its code."""
    from vargpt_rl.common.command import run_program

    # Importing it may tell of an extra that is not installed.
    raise typer.Exit(run_program(lambda given: importlib.import_module(module).main(given), arguments))


def add_program(app: typer.Typer, program: Program) -> None:
    """Add a subcommand that takes nothing but ``key=value``."""

    def run(settings: settings_argument(program) = None) -> None:  # type: ignore[valid-type]
        refuse_misspelt(program, settings or [])
        call(program.module, settings or [])

    app.command(program.name, help=help_text(program.summary), cls=command_class(program))(run)


def refuse_misspelt(program: Program, settings: list[str]) -> None:
    """Exit with one line if a key is unlike all, but near one, before the seconds that the program's imports take.

    What this lets pass, the program checks.
    """
    if program.passes_on:
        return
    known = {key for path in program.settings for key, _ in dotted_fields(class_path(path))}
    for setting in settings:
        key, equals, value = setting.partition("=")
        key = key.lstrip("+")
        names = key.split(".")
        beginnings = {".".join(names[: i + 1]) for i in range(len(names))}
        words = known | CONFIG_GROUPS if LOOP in program.settings else known
        meant = difflib.get_close_matches(key, words, n=1, cutoff=0.8)
        if not equals or not meant or beginnings & (known - groups_of(program)) or key in known | CONFIG_GROUPS:
            continue
        from vargpt_rl.common.command import report_error
        from vargpt_rl.common.secret_check import check_secrets

        try:
            check_secrets(value, key)
        except ValueError as error:
            report_error(error)
        else:
            report_error(f"{setting}: there is no key {key}, did you mean {meant[0]}?")
        raise typer.Exit(2)


def groups_of(program: Program) -> set[str]:
    """Return the dotted names of the groups of settings."""
    return {key for path in program.settings for key, field in dotted_fields(class_path(path)) if field.group}


def settings_argument(program: Program) -> Any:
    """Return the type of the parameter that takes the ``key=value`` arguments of a program."""
    paths = (*program.settings, LOOP) if program.passes_on else program.settings
    complete: Callable[[str], list[tuple[str, str]]] = complete_keys(paths)
    return Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings; quote lists.", autocompletion=complete, show_default=False),
    ]
