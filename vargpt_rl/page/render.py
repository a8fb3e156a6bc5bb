"""Render the page of a run, or of two side by side, as one HTML file."""

import hashlib
import json
import logging
import pkgutil
import re
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vargpt_rl.page.contents import RunContents, read_run, read_runs
from vargpt_rl.page.curves import Plot, all_curves
from vargpt_rl.page.images import galleries, skill_tables, verdicts
from vargpt_rl.page.sections import duration, head, pair_sections, settings_section, time_section
from vargpt_rl.page.step_titles import step_title
from vargpt_rl.storage.files import write_atomically

logger = logging.getLogger(__name__)

PAGE = "report.html"
"""File of the page in the run directory."""
GRIDS = ("iter-*.png", "edit.png")
"""Sample grids that are shown as they are."""
SECTION = re.compile(r"<section id=.*?</section>", re.DOTALL)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("vargpt_rl.page", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render_template(name: str, /, **values: object) -> str:
    """Return a template filled in; all values are escaped."""
    return _environment().get_template(name).render(**values)


@cache
def plotly_js() -> Markup:
    """Return the source of plotly.js, which goes into the page once. RuntimeError if the package lacks it."""
    source = pkgutil.get_data("plotly", "package_data/plotly.min.js")
    if source is None:
        raise RuntimeError("plotly is installed without plotly.min.js")
    return Markup(source.decode("utf-8").replace("</script", "<\\/script"))


def script_json(value: object) -> Markup:
    """Return JSON that is safe inside a script element: no text can close it. Numbers that are not finite are null."""
    text = json.dumps(_finite(value), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value


def render(runs: Sequence[RunContents], live: str = "", library: bool = True) -> str:
    """Return the page of one run or of two.

    ``live`` is the address that a live page asks for news. Then each section has a digest, so that the page takes over
    those that differ; a later version needs no plotting ``library``.
    """
    curves = all_curves(list(runs))
    pairs = pair_sections(runs)
    times = [time_section(run) for run in runs]
    plots: list[Plot] = [plot for stage in curves for plot in stage.plots]
    plots += [plot for section in pairs for plot in section.plots]
    plots += [section.plot for section in times if section.plot]
    numbers = {id(plot): number for number, plot in enumerate(plots)}
    text = render_template(
        "run.html",
        title=" and ".join(run.name for run in runs),
        heads=[head(run) for run in runs],
        verdicts=verdicts(runs),
        galleries=galleries(runs),
        grids=[grid for run in runs for grid in _grids(run)],
        skills=skill_tables(runs),
        curves=curves,
        pairs=pairs,
        times=times,
        settings=settings_section(runs),
        figures=script_json([plot.figure for plot in plots]),
        number_of=lambda plot: numbers[id(plot)],
        plotly=plotly_js() if library and (plots or live) else Markup(""),
        duration=duration,
        version=_version(),
        live=live,
    )
    return SECTION.sub(_with_digest, text) if live else text


def _with_digest(section: re.Match[str]) -> str:
    digest = hashlib.blake2b(section[0].encode(), digest_size=8).hexdigest()
    return section[0].replace("<section ", f'<section data-digest="{digest}" ', 1)


def _grids(run: RunContents) -> list[tuple[str, str | None]]:
    """Return the sample grids with their titles."""
    return [
        (f"{run.name}, {step_title(path.stem)}", run.image(f"samples/{path.name}"))
        for pattern in GRIDS
        for path in sorted((run.folder / "samples").glob(pattern))
        if not path.stem.endswith("-pairs")
    ]


def _version() -> str:
    try:
        return version("vargpt-rl")
    except PackageNotFoundError:
        return "source tree"


def write_page(folders: Sequence[Path], target: Path | None = None) -> Path:
    """Write the page of the runs; return its path: by default `PAGE`, or ``compare-OTHER.html``, of the first one.

    ValueError if a folder is no directory, or both are the same.
    """
    runs = read_runs(folders)
    path = target or folders[0] / (PAGE if len(runs) == 1 else f"compare-{runs[1].name.replace('/', '-')}.html")
    write_atomically(path, render(runs).encode())
    return path


def update_page(folder: Path, ended: bool = False) -> None:
    """Rewrite the page of a run under way, or of one that ends now.

    A failure is logged and ends nothing: the page is for people alone.
    """
    try:
        run = read_run(folder)
        run.ended = ended
        write_atomically(folder / PAGE, render([run]).encode())
    except Exception as error:
        logger.warning("%s was not written: %s: %s", folder / PAGE, type(error).__name__, error, exc_info=True)
