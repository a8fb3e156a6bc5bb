"""The tree of subcommands of ``vargpt-rl``."""

import sys
from typing import Annotated

import typer

from vargpt_rl.cli.configuration import add_configuration_commands
from vargpt_rl.cli.images import SETTING, add_image_commands
from vargpt_rl.cli.pages import add_page_commands
from vargpt_rl.cli.runs import add_run_commands
from vargpt_rl.cli.tools import add_tool_groups
from vargpt_rl.common.streams import make_outputs_lasting

SUMMARY = """
Preference alignment for models that write text and draw images scale by scale.

\b
Examples:
  vargpt-rl draw "a large red circle"  an image, in seconds
  vargpt-rl demo                       a small run, in minutes
  vargpt-rl chat                       ask and draw
  vargpt-rl run data=captioned ...     your own images

Settings are key=value. `vargpt-rl config keys` explains them; --install-completion completes them in your shell.
"""


def print_version(wanted: bool) -> None:
    """Print the version and end, if it is wanted."""
    if wanted:
        from importlib.metadata import version

        print(f"vargpt-rl {version('vargpt-rl')}")
        raise typer.Exit


def make_app() -> typer.Typer:
    """Build the command with all subcommands."""
    app = typer.Typer(
        name="vargpt-rl",
        help=SUMMARY,
        no_args_is_help=True,
        rich_markup_mode=None,  # rich's help takes as long to load as all the rest
        pretty_exceptions_enable=False,
        context_settings={"max_content_width": 100},
    )

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", help="Show the version.", callback=print_version, is_eager=True)
        ] = False,
    ) -> None:
        pass

    add_run_commands(app)
    add_page_commands(app)
    add_image_commands(app)
    add_tool_groups(app)
    add_configuration_commands(app)
    return app


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    if arguments is None:
        arguments = sys.argv[1:]
        make_outputs_lasting()  # `vargpt-rl runs | head` is no error
    if arguments and SETTING.match(arguments[0]):
        from vargpt_rl.common.command import report_error

        report_error(f"expected a command, got the setting {arguments[0]}: did you mean vargpt-rl run {arguments[0]}?")
        return 2
    try:
        make_app()(arguments, prog_name="vargpt-rl")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    return 0
