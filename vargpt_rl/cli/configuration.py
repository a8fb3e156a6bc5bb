"""Subcommands about settings and the machine: ``config show``, ``config keys``, ``env``."""

from collections.abc import Callable
from typing import Annotated

import typer

from vargpt_rl.cli.completion import LOOP, complete_runs, find_run
from vargpt_rl.cli.pages import or_error
from vargpt_rl.cli.programs import Program, command_class, help_text, settings_argument
from vargpt_rl.cli.tools import group

SHOW = Program(
    name="show",
    module="configs.load",
    summary="Print all settings that a run would have, as YAML. Nothing is started.",
    examples=("vargpt-rl config show", "vargpt-rl config show experiment=quick dpo.beta=0.2"),
    settings=(LOOP,),
)
KEYS = Program(
    name="keys",
    module="configs.schema",
    summary="""
    List the keys of a run with types, defaults, ranges and explanations.

    Only those below PREFIX, or those that have the word in name or explanation.
    """,
    examples=("vargpt-rl config keys", "vargpt-rl config keys sft", "vargpt-rl config keys temperature"),
)
DIFF = Program(
    name="diff",
    module="vargpt_rl.page.listing",
    summary="Show the settings in which two runs differ, or one run from the defaults of its version.",
    examples=("vargpt-rl config diff runs/demo", "vargpt-rl config diff first second"),
)
ENV = Program(
    name="env",
    module="vargpt_rl.doctor",
    summary="Print versions, known vulnerabilities of them, and devices, for a bug report.",
    examples=("vargpt-rl env",),
)


def run_checked(execute: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Run a function of this module and exit with its code."""
    from vargpt_rl.common.command import run_program

    raise typer.Exit(run_program(execute, arguments))


def show_settings(arguments: list[str]) -> None:
    """Print the settings of a run."""
    from omegaconf import OmegaConf

    from configs.load import load_config

    config = OmegaConf.structured(load_config(arguments))
    print(OmegaConf.to_yaml(OmegaConf.create(OmegaConf.to_container(config, enum_to_str=True))), end="")


def show_keys(prefix: str | None, markdown: bool) -> None:
    """Print the reference of keys."""
    from vargpt_rl.cli.reference import as_markdown, as_text, keys_of_a_run, matching

    keys = matching(keys_of_a_run(), prefix)
    if not keys:
        raise ValueError(f"{prefix}: no key has this prefix or word, see `vargpt-rl config keys`")
    print((as_markdown if markdown else as_text)(keys), end="")


def show_difference(run: str, other: str | None) -> None:
    """Print the settings in which two runs differ, or one from its defaults."""
    from vargpt_rl.page.contents import read_run
    from vargpt_rl.page.listing import differing_settings

    runs = [read_run(find_run(name)) for name in (run, other) if name is not None]
    print("\n".join(differing_settings(runs)) or "no setting differs")


def show_environment(_: list[str]) -> None:
    """Print versions and devices."""
    from vargpt_rl.doctor import about, found_gpus

    print("\n".join(about(found_gpus())))


def add_configuration_commands(app: typer.Typer) -> None:
    """Add ``config`` and ``env``."""
    config = group(app, "config", "Show and explain settings.", (SHOW, KEYS, DIFF))

    @config.command(SHOW.name, help=help_text(SHOW.summary), cls=command_class(SHOW))
    def show(settings: settings_argument(SHOW) = None) -> None:  # type: ignore[valid-type]
        run_checked(show_settings, settings or [])

    @config.command(KEYS.name, help=help_text(KEYS.summary), cls=command_class(KEYS))
    def keys(
        prefix: Annotated[str | None, typer.Argument(help="Beginning of keys, or a word.", show_default=False)] = None,
        markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown page.")] = False,
    ) -> None:
        run_checked(lambda _: show_keys(prefix, markdown), [])

    @config.command(DIFF.name, help=help_text(DIFF.summary), cls=command_class(DIFF))
    def diff(
        run: Annotated[str, typer.Argument(metavar="RUN", autocompletion=complete_runs)],
        other: Annotated[
            str | None, typer.Argument(metavar="OTHER", autocompletion=complete_runs, show_default=False)
        ] = None,
    ) -> None:
        or_error(lambda: show_difference(run, other))

    @app.command(ENV.name, help=help_text(ENV.summary), cls=command_class(ENV))
    def env() -> None:
        run_checked(show_environment, [])
