"""Subcommands that use a model: ``draw``, ``generate``, ``chat``, ``eval``."""

import re
from typing import Annotated

import typer

from vargpt_rl.cli.programs import (
    Program,
    add_program,
    call,
    command_class,
    help_text,
    refuse_misspelt,
    settings_argument,
)
from vargpt_rl.common.fields import class_fields, class_path

SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)*=")
DRAW = Program(
    name="draw",
    module="vargpt_rl.generate",
    summary="""
    Draw images of a prompt, or of several, or edit an image.

    Prints the path of each image. `generate` draws the prompts of a file, and resumes where it was interrupted.
    """,
    examples=(
        'vargpt-rl draw "a large red circle"',
        'vargpt-rl draw "two blue squares" "a small green triangle" images=4 seed=1',
        'vargpt-rl draw "make the circle blue" image=images/a-large-red-circle.png',
        'vargpt-rl draw "a large red circle" checkpoint=runs/demo/model',
    ),
    settings=("vargpt_rl.generate:DrawConfig",),
)
GENERATE = Program(
    name="generate",
    module="vargpt_rl.generate",
    summary="Generate the images of a file of prompts into a folder; the same command resumes.",
    examples=(
        "vargpt-rl generate prompts=prompts.txt out=images images=4",
        'vargpt-rl generate prompt="make the circle blue" image=circle.png out=edited',
    ),
    settings=("vargpt_rl.generate:GenerateConfig",),
)
CHAT = Program(
    name="chat",
    module="vargpt_rl.chat",
    summary="""
    Chat with a model in the terminal, or in the browser.

    In the terminal, lines may be piped in, and /help lists the commands. With --page, open the printed address: images,
    seeds, sizes and two checkpoints side by side; it holds a secret and is answered on 127.0.0.1 alone. Needs the extra
    "serve".
    """,
    examples=(
        "vargpt-rl chat",
        "vargpt-rl chat checkpoint=runs/demo/model",
        "vargpt-rl chat --page --beside runs/demo/model",
        'echo "a large red circle" | vargpt-rl chat',
    ),
    settings=("vargpt_rl.chat:ChatConfig",),
)
EVAL = Program(
    name="eval",
    module="vargpt_rl.evaluate.__main__",
    summary="Measure checkpoints side by side on a benchmark; the same command resumes.",
    examples=(
        "vargpt-rl eval shapes 'checkpoints=[tiny,runs/demo/model]' resolution=256",
        "vargpt-rl eval geneval checkpoint=DIR prompts=evaluation_metadata.jsonl",
    ),
    settings=("vargpt_rl.evaluate.settings:EvaluateConfig",),
    hidden=("benchmark",),
)
BENCHMARKS = ("shapes", "geneval", "geneval2", "dpg", "clip", "hps", "fid", "questions", "lmms")
"""Values of ``vargpt_rl.evaluate.settings.Benchmark``."""


def split_prompts(words: list[str]) -> tuple[list[str], list[str]]:
    """Split arguments into prompts and settings."""
    keys = class_fields(class_path(DRAW.settings[0]))
    settings = [word for word in words if SETTING.match(word) and (" " not in word or word.partition("=")[0] in keys)]
    return [word for word in words if word not in settings], settings


def add_image_commands(app: typer.Typer) -> None:
    """Add ``draw``, ``generate``, ``chat`` and ``eval``."""

    @app.command(DRAW.name, help=help_text(DRAW.summary), cls=command_class(DRAW))
    def draw(
        prompt: Annotated[str, typer.Argument(metavar="PROMPT")],
        settings: settings_argument(DRAW) = None,  # type: ignore[valid-type]
    ) -> None:
        prompts, given = split_prompts([prompt, *(settings or [])])
        refuse_misspelt(DRAW, given)
        from vargpt_rl.generate import main_draw

        raise typer.Exit(main_draw(prompts, given))

    add_program(app, GENERATE)

    @app.command(CHAT.name, help=help_text(CHAT.summary), cls=command_class(CHAT))
    def chat(
        page: Annotated[bool, typer.Option("--page", help="In the browser, on a page of this machine.")] = False,
        beside: Annotated[
            str | None, typer.Option("--beside", help="A second checkpoint, side by side.", show_default=False)
        ] = None,
        port: Annotated[
            int, typer.Option("--port", min=0, max=65535, help="Port of the page; 0 takes a free one.")
        ] = 0,
        settings: settings_argument(CHAT) = None,  # type: ignore[valid-type]
    ) -> None:
        refuse_misspelt(CHAT, settings or [])
        if not page:
            if beside or port:
                raise typer.BadParameter("--beside and --port are for --page")
            call(CHAT.module, settings or [])
        from vargpt_rl.common.command import run_program

        def serve(given: list[str]) -> None:
            from vargpt_rl.cli.chat_page import serve_chat

            serve_chat(given, beside, port)

        raise typer.Exit(run_program(serve, settings or []))

    @app.command(EVAL.name, help=help_text(EVAL.summary), cls=command_class(EVAL))
    def evaluate(
        benchmark: Annotated[
            str, typer.Argument(metavar="BENCHMARK", help=", ".join(BENCHMARKS), autocompletion=lambda: BENCHMARKS)
        ],
        settings: settings_argument(EVAL) = None,  # type: ignore[valid-type]
    ) -> None:
        refuse_misspelt(EVAL, settings or [])
        call(EVAL.module, [f"benchmark={benchmark}", *(settings or [])])
