"""Subcommands that start or resume a run: ``demo``, ``run``, ``resume``."""

import sys
from typing import Annotated

import typer

from vargpt_rl.cli.completion import LOOP, complete_runs, find_run
from vargpt_rl.cli.programs import Program, command_class, help_text, refuse_misspelt, settings_argument
from vargpt_rl.common.signals import handle_signals
from vargpt_rl.common.streams import make_outputs_lasting

DEMO = Program(
    name="demo",
    module="vargpt_rl.loop",
    summary="""
    Align the embedded model on the shapes world.

    GRPO on the model's own images at 256 px: some three minutes on two CPU cores. --full pretrains the projectors,
    trains understanding, and aligns by SFT, DPO and GRPO at 128 and 256 px, in some seven minutes. Results: runs/demo
    or runs/shapes-128-256.
    """,
    examples=("vargpt-rl demo", "vargpt-rl demo --full", "vargpt-rl demo seed=1 name=second"),
    settings=(LOOP,),
)
RUN = Program(
    name="run",
    module="vargpt_rl.loop",
    summary="""
    Align a model by iterated SFT and preference training.

    The same command resumes an interrupted run, and so does `vargpt-rl resume`. Results: runs/NAME. Exit codes: 0 done,
    1 failed, 2 a setting or an input is wrong, 75 stopped by a signal or waiting for people's labels, 130 by Ctrl-C.
    """,
    examples=(
        "vargpt-rl run name=first iterations=1 'resolutions=[128]'",
        "vargpt-rl run 'align.methods=[dpo]' reward.path=null",
        "vargpt-rl run data=captioned data.captions=FILE data.images=DIR preference.winners=DIR",
        "vargpt-rl run experiment=vargpt_v1_1_grpo checkpoint=DIR data=records preference.prompts=FILE ...",
    ),
    settings=(LOOP,),
)
RESUME = Program(
    name="resume",
    module="vargpt_rl.loop",
    summary="""
    Resume an interrupted run with the settings in its folder.

    Only settings that do not change the result may be given: rollout.workers, learner.save_every and the like.
    """,
    examples=("vargpt-rl resume runs/first", "vargpt-rl resume first rollout.workers=2"),
    settings=(LOOP,),
)


def run_loop(arguments: list[str]) -> None:
    """Run the loop and exit with its code. Signals are handled before the seconds that its imports take."""
    make_outputs_lasting()
    handle_signals()
    if sys.stderr.isatty():
        print("loading ...", file=sys.stderr)
    from vargpt_rl.loop import main

    raise typer.Exit(main(arguments))


def add_run_commands(app: typer.Typer) -> None:
    """Add ``demo``, ``run`` and ``resume``."""

    @app.command(DEMO.name, help=help_text(DEMO.summary), cls=command_class(DEMO))
    def demo(
        full: Annotated[bool, typer.Option("--full", help="All but tokenizer and edit, at 128 and 256 px.")] = False,
        settings: settings_argument(DEMO) = None,  # type: ignore[valid-type]
    ) -> None:
        refuse_misspelt(DEMO, settings or [])
        run_loop([*([] if full else ["experiment=quick"]), *(settings or [])])

    @app.command(RUN.name, help=help_text(RUN.summary), cls=command_class(RUN))
    def run(settings: settings_argument(RUN) = None) -> None:  # type: ignore[valid-type]
        refuse_misspelt(RUN, settings or [])
        run_loop(settings or [])

    @app.command(RESUME.name, help=help_text(RESUME.summary), cls=command_class(RESUME))
    def resume(
        run: Annotated[str, typer.Argument(metavar="RUN", autocompletion=complete_runs)],
        settings: settings_argument(RESUME) = None,  # type: ignore[valid-type]
    ) -> None:
        try:
            folder = find_run(run)
        except ValueError as error:
            from vargpt_rl.common.command import report_error

            report_error(error)
            raise typer.Exit(2) from error
        refuse_misspelt(RESUME, settings or [])
        run_loop([f"resume={folder}", *(settings or [])])
