"""DPG-Bench: grids of four images as its scorer reads them, and the scorer's results as our metrics.

``prompts`` is the benchmark's folder (``dpg_bench`` of github.com/TencentQQGYLab/ELLA), with ``prompts/<item>.txt`` and
``dpg_bench.csv``. The scorer, ``compute_dpg_bench.py`` there, cuts ``images/<item>.png`` into four squares (left to
right, top to bottom), asks mPLUG the item's questions about each and writes a text file: a line for each item with its
four scores and their mean, then scores by category and the DPG-Bench score, all in percent.

The scorer leaves out the first row of the CSV and passes over images that fail with a line on its terminal; here,
such items are counted as unscored.
"""

import re
from pathlib import Path

import pandas as pd
from PIL import Image

from vargpt_rl.common.averages import mean_and_error
from vargpt_rl.data.images import read_image
from vargpt_rl.evaluate.report import Column, Scores
from vargpt_rl.evaluate.rows import quarantine_of
from vargpt_rl.evaluate.settings import EvaluateConfig
from vargpt_rl.evaluate.subject import EvaluatedModel, ImageRequest
from vargpt_rl.inference.images import save_image

ACROSS = 2  # images in a row of the grid, and rows
SAMPLES = ACROSS**2
RESULTS, QUESTIONS = "dpg_results.txt", "dpg_bench.csv"
CATEGORIES = ("global", "entity", "attribute", "relation", "other")
SAME = 1e-6  # of two ways to the same mean, in percent


class DpgBench:
    """A grid of four images of every prompt."""

    columns = [Column(name, name) for name in (*CATEGORIES, "overall")]

    def __init__(self, config: EvaluateConfig):
        height, width = config.size
        if height != width:
            raise ValueError(f"aspect={config.aspect}: benchmark=dpg needs square images")
        self.config, self.folder = config, Path(config.prompts)
        self.prompts, self.bad = self._read()
        self.wanted = [
            ImageRequest(f"images/{item}-{k}.png", prompt, index, k)
            for index, (item, prompt) in enumerate(self.prompts.items())
            for k in range(SAMPLES)
        ]

    def _read(self) -> tuple[dict[str, str], int]:
        """The usable prompts by item, and how many are bad. ValueError where files of the benchmark are missing."""
        files = {path.stem: path for path in sorted((self.folder / "prompts").glob("*.txt"))}
        if not files:
            raise ValueError(f"prompts={self.folder}: no {self.folder / 'prompts'}/*.txt, expected DPG-Bench's folder")
        asked = _items(self.folder / QUESTIONS)
        missing = sorted(asked - set(files))
        if missing:
            raise ValueError(
                f"prompts={self.folder}: {QUESTIONS} asks about {len(asked)} items, {len(missing)} have no prompt, "
                f"e.g. {self.folder / 'prompts' / missing[0]}.txt"
            )
        quarantine, prompts = quarantine_of(self.config), {}
        for item, path in files.items():
            prompt = path.read_text(encoding="utf-8", errors="replace").strip()
            if item in asked and prompt and "." not in item:  # the scorer cuts names at the first dot
                prompts[item] = prompt
            else:
                reason = "prompt is empty" if not prompt else "prompt without a question, or with a dot in its name"
                quarantine.add(str(path), prompt, reason)
        bad = len(files) - len(prompts)
        quarantine.check(len(files), self.config.max_bad_fraction, bad)
        return dict(list(prompts.items())[: self.config.limit]), bad

    def make(self, subject: EvaluatedModel) -> None:
        subject.draw(self.wanted)

    def score(self, subject: EvaluatedModel) -> Scores:
        """ValueError that says how to run the scorer, where there are no results yet or not all of them."""
        paths = subject.paths(self.wanted)
        for index, item in enumerate(self.prompts):
            write_grid(paths[SAMPLES * index : SAMPLES * (index + 1)], subject.out / f"images/{item}.png")
        results = subject.out / RESULTS
        again = (
            f"run DPG-Bench's scorer, accelerate launch dpg_bench/compute_dpg_bench.py --image-root-path "
            f"{(subject.out / 'images').resolve()} --resolution {self.config.size[0]} --pic-num {SAMPLES} "
            f"--csv {(self.folder / QUESTIONS).resolve()} --res-path {results.resolve()}, then this command again"
        )
        if not results.is_file():
            raise ValueError(f"{subject.name}: the images are drawn, but {results} is not there: {again}")
        try:
            scores, items = read_results(results.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{results}: {error}: {again}") from error
        unscored = len(set(self.prompts) - set(items))
        if set(items) - set(self.prompts) or unscored > self.config.max_bad_fraction * len(self.prompts):
            ours = len(set(items) & set(self.prompts))
            raise ValueError(f"{results}: {len(items)} items, {ours} of the {len(self.prompts)} wanted: {again}")
        scores.counts |= {"unscored": unscored, "bad_prompts": self.bad}
        return scores


def _items(path: Path) -> set[str]:
    """The items that the benchmark's table asks about. ValueError where it is no such table."""
    try:
        table = pd.read_csv(path, usecols=["item_id"], dtype=str)
    except (OSError, ValueError) as error:
        raise ValueError(f"prompts={path.parent}: {path} is not DPG-Bench's table of questions: {error}") from error
    return set(table["item_id"].dropna())


def write_grid(paths: list[Path], path: Path) -> None:
    """Lay square images out in rows, unless ``path`` is newer than all of them."""
    if path.exists() and path.stat().st_mtime_ns > max(each.stat().st_mtime_ns for each in paths):
        return
    images = [read_image(each) for each in paths]
    side = images[0].width
    grid = Image.new("RGB", (ACROSS * side, ACROSS * side))
    for k, image in enumerate(images):
        grid.paste(image, (k % ACROSS * side, k // ACROSS * side))
    path.parent.mkdir(exist_ok=True)
    save_image(grid, path)


def read_results(text: str) -> tuple[Scores, dict[str, float]]:
    """The scorer's file: its scores, and the mean of each item. ValueError where it breaks off or is at odds."""
    stated = re.findall(r"^DPG-Bench score: (\S+)$", text, re.MULTILINE)
    if len(stated) != 1:
        raise ValueError("does not end with one DPG-Bench score")
    lines, _, categories = text.partition("L1 category scores:")
    items: dict[str, float] = {}
    for line in lines.splitlines():
        name, *numbers = line.rsplit(", ", SAMPLES + 1)
        if len(numbers) == SAMPLES + 1:
            if not 0 <= float(numbers[-1]) <= 1:
                raise ValueError(f"{name} has a mean that is no number from 0 to 1")
            items[Path(name).stem] = 100 * float(numbers[-1])
        elif not line.startswith("Model: "):
            raise ValueError(f"{line!r} is no item's path with {SAMPLES} scores and their mean")
    overall, error = mean_and_error(list(items.values()))
    if abs(overall - float(stated[0])) > SAME:
        raise ValueError(f"states a score of {stated[0]}, but its {len(items)} items have a mean of {overall}")
    broad, _, detailed = categories.partition("L2 category scores:")
    by_category = {name.lower(): value for name, value in _numbers(broad).items()}
    return (
        Scores({**by_category, "overall": overall}, {"overall": error}, {"items": len(items)}, _numbers(detailed)),
        items,
    )


def _numbers(text: str) -> dict[str, float]:
    """The indented lines "name: value"."""
    return {name: float(value) for name, value in re.findall(r"^\t(.+): ([\d.e-]+)$", text, re.MULTILINE)}
