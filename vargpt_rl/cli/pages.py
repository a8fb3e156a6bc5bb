"""Subcommands that show runs in a browser: ``report``, ``compare``, ``watch``, ``pairs``."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from vargpt_rl.cli.completion import RUNS, complete_runs, find_run, run_folders
from vargpt_rl.cli.programs import Program, command_class, help_text

RUNS_LIST = Program(
    name="runs",
    module="vargpt_rl.page.listing",
    summary="List runs, the latest first: status, steps, time and the score measured last.",
    examples=("vargpt-rl runs", "vargpt-rl runs OTHER_FOLDER"),
)
REPORT = Program(
    name="report",
    module="vargpt_rl.page",
    summary="""
    Write the page of a run: one HTML file for any browser.

    Verdicts, held-out images, skills, curves, pairs, time and settings. A run writes it by itself after each step, as
    report.html in its folder; this command writes it anew, also for older runs.
    """,
    examples=("vargpt-rl report runs/demo", "vargpt-rl report demo --out demo.html"),
)
COMPARE = Program(
    name="compare",
    module="vargpt_rl.page",
    summary="""
    Write one page with two runs side by side.

    Settings that differ, curves over each other, images of the same prompts in one row, and the last policies compared
    image by image.
    """,
    examples=("vargpt-rl compare runs/first runs/second", "vargpt-rl compare first second --out both.html"),
)
WATCH = Program(
    name="watch",
    module="vargpt_rl.page.watch",
    summary="""
    Show the page of a run, live, on this machine.

    Open the printed address; it holds a secret and is answered on 127.0.0.1 alone. The run is only read. Ctrl-C ends
    the page, not the run. Needs the extra "serve".
    """,
    examples=("vargpt-rl watch runs/demo", "vargpt-rl watch demo --port 8080"),
)
PAIRS = Program(
    name="pairs",
    module="vargpt_rl.page.label",
    summary="""
    Let people label the pairs of a run, on a page of this machine.

    Keys: 1 left, 2 right, 3 alike, 4 both bad, u undo, s skip. Sides are shuffled, origins hidden. Answers are in
    RUN/labels. Several raters may use several browsers. Shown are the pairs whose images are kept
    (tracking.table_rows). Needs the extra "serve".

    --summary says what the labels show, --export writes them with the columns of Pick-a-Pic.
    """,
    examples=(
        "vargpt-rl pairs runs/shapes-128-256",
        "vargpt-rl pairs shapes-128-256 --summary",
        "vargpt-rl pairs shapes-128-256 --export labelled.parquet",
    ),
)
RunName = Annotated[str, typer.Argument(metavar="RUN", autocompletion=complete_runs)]
Out = Annotated[Path | None, typer.Option("--out", help="File to write.", show_default=False)]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")]


def or_error(work: Callable[[], None]) -> None:
    """Do the work; exit with 2 and one line if an input is wrong."""
    try:
        work()
    except (OSError, ValueError, ImportError) as error:
        from vargpt_rl.common.command import report_error

        hint = ": install vargpt-rl[serve]" if isinstance(error, ImportError) else ""
        report_error(f"{error}{hint}")
        raise typer.Exit(2) from error


def write(names: list[str], out: Path | None) -> None:
    """Write the page of one run or two and print its path."""
    from vargpt_rl.page.render import write_page

    print(write_page([find_run(name) for name in names], out))


def list_runs(folder: Path) -> None:
    """Print a line for each run in a folder. ValueError if there is none."""
    from vargpt_rl.page.contents import read_run
    from vargpt_rl.page.listing import run_lines

    found = run_folders(folder)
    if not found:
        raise ValueError(f"{folder}: there is no run here; `vargpt-rl demo` makes one")
    print("\n".join(run_lines([read_run(run) for run in found])))


def label(name: str, port: int, summary: bool, target: Path | None) -> None:
    """Label the pairs of a run, or say what the labels show, or export them."""
    folder = find_run(name)
    if summary or target:
        from vargpt_rl.page.contents import read_run
        from vargpt_rl.page.labels import export, summarise_labels

        contents = read_run(folder)
        if target:
            print(f"{export(contents, target)} labelled pairs are in {target}")
        if summary:
            print("\n".join(summarise_labels(contents)))
        return
    from vargpt_rl.page.label import label_pairs

    label_pairs(folder, port)


def add_page_commands(app: typer.Typer) -> None:
    """Add ``runs``, ``report``, ``compare``, ``watch`` and ``pairs``."""

    @app.command(RUNS_LIST.name, help=help_text(RUNS_LIST.summary), cls=command_class(RUNS_LIST))
    def runs(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the runs.")] = RUNS) -> None:
        or_error(lambda: list_runs(folder))

    @app.command(PAIRS.name, help=help_text(PAIRS.summary), cls=command_class(PAIRS))
    def pairs(
        run: RunName,
        port: Port = 0,
        summary: Annotated[bool, typer.Option("--summary", help="Print what the labels show.")] = False,
        export: Annotated[
            Path | None, typer.Option("--export", help="Parquet file to write.", show_default=False)
        ] = None,
    ) -> None:
        or_error(lambda: label(run, port, summary, export))

    @app.command(REPORT.name, help=help_text(REPORT.summary), cls=command_class(REPORT))
    def report(run: RunName, out: Out = None) -> None:
        or_error(lambda: write([run], out))

    @app.command(COMPARE.name, help=help_text(COMPARE.summary), cls=command_class(COMPARE))
    def compare(first: RunName, second: RunName, out: Out = None) -> None:
        or_error(lambda: write([first, second], out))

    @app.command(WATCH.name, help=help_text(WATCH.summary), cls=command_class(WATCH))
    def watch(run: RunName, port: Port = 0) -> None:
        def follow() -> None:
            from vargpt_rl.page.watch import watch as serve_page

            serve_page(find_run(run), port)

        or_error(follow)
