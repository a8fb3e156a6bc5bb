"""Subcommands that pass their ``key=value`` arguments to the program of a module."""

import importlib
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from vargpt_rl.cli.completion import complete_keys
from vargpt_rl.common.fields import FieldSource, class_fields, class_path, key_shown, meaning

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

    @property
    def fields(self) -> dict[str, FieldSource]:
        """The keys of all classes."""
        found = {name: field for path in self.settings for name, field in class_fields(class_path(path)).items()}
        return {name: field for name, field in found.items() if name not in self.hidden}


def command_class(program: Program) -> type[TyperCommand]:
    """Return a command whose help ends with examples and keys, read only if help is asked for."""

    class ProgramCommand(TyperCommand):
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
        call(program.module, settings or [])

    app.command(program.name, help=help_text(program.summary), cls=command_class(program))(run)


def settings_argument(program: Program) -> Any:
    """Return the type of the parameter that takes the ``key=value`` arguments of a program."""
    complete: Callable[[str], list[tuple[str, str]]] = complete_keys(program.settings)
    return Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings; quote lists.", autocompletion=complete, show_default=False),
    ]
