"""DPG-Bench: write the image grids that its scorer reads, and read the scorer's results.

``prompts`` is the benchmark's folder (``dpg_bench`` of github.com/TencentQQGYLab/ELLA), with ``prompts/<item>.txt`` and
``dpg_bench.csv``. The scorer, ``compute_dpg_bench.py`` there, cuts ``images/<item>.png`` into four squares (left to
right, top to bottom), asks mPLUG the item's questions about each square and writes a text file: one line per item with
its four scores and their mean, then the scores by category and the DPG-Bench score in percent.

The scorer skips the first row of the CSV, and images that fail (it only prints a line); such items are counted as
unscored here.
"""

import re
from pathlib import Path

import pandas as pd
from PIL import Image

from vargpt_rl.data.images import read_image
from vargpt_rl.evaluate.evaluated_model import EvaluatedModel, ImageRequest
from vargpt_rl.evaluate.report import Column, Scores, summarise
from vargpt_rl.evaluate.rows import quarantine_of
from vargpt_rl.evaluate.settings import EvaluateConfig
from vargpt_rl.inference.images import save_image

ACROSS = 2  # images per row of the grid, and rows per grid
SAMPLES = ACROSS**2
RESULTS, QUESTIONS = "dpg_results.txt", "dpg_bench.csv"
CATEGORIES = ("global", "entity", "attribute", "relation", "other")
SAME = 1e-6  # tolerated rounding between the stated mean and ours, in percent


class DpgBench:
    """The benchmark: one grid of four images per prompt."""

    columns = [Column(name, name) for name in (*CATEGORIES, "overall")]

    def __init__(self, config: EvaluateConfig):
        height, width = config.size
        if height != width:
            raise ValueError(f"aspect={config.aspect}: benchmark=dpg needs square images, expected 1:1")
        self.config = config
        assert config.prompts is not None  # `EvaluateConfig` requires it for this benchmark
        self.folder = Path(config.prompts)
        self.prompts, self.bad = self._read()
        self.requests = [
            ImageRequest(f"samples/{item}-{k}.png", prompt, index, k)
            for index, (item, prompt) in enumerate(self.prompts.items())
            for k in range(SAMPLES)
        ]

    def _read(self) -> tuple[dict[str, str], int]:
        """Return the usable prompts by item and the number of bad ones. ValueError if benchmark files are missing."""
        files = {path.stem: path for path in sorted((self.folder / "prompts").glob("*.txt"))}
        if not files:
            raise ValueError(
                f"prompts={self.folder}: expected DPG-Bench's folder, found no {self.folder / 'prompts'}/*.txt"
            )
        items = _items(self.folder / QUESTIONS)
        missing = sorted(items - set(files))
        if missing:
            raise ValueError(
                f"prompts={self.folder}: {QUESTIONS} has {len(items)} items, {len(missing)} of them without a prompt, "
                f"for example {self.folder / 'prompts' / missing[0]}.txt"
            )
        quarantine = quarantine_of(self.config)
        prompts = {}
        for item, path in files.items():
            prompt = path.read_text(encoding="utf-8", errors="replace").strip()
            if item in items and prompt and "." not in item:  # the scorer cuts names at the first dot
                prompts[item] = prompt
            else:
                reason = "prompt is empty" if not prompt else "prompt has no question, or a dot in its name"
                quarantine.add(str(path), prompt, reason)
        bad = len(files) - len(prompts)
        quarantine.check(len(files), self.config.max_bad_fraction, bad)
        return dict(list(prompts.items())[: self.config.limit]), bad

    def make(self, model: EvaluatedModel) -> None:
        model.draw(self.requests)

    def score(self, model: EvaluatedModel) -> Scores:
        """Read the scorer's results. If they are missing or incomplete, ValueError with the command that makes them."""
        paths = model.paths(self.requests)
        for index, item in enumerate(self.prompts):
            write_grid(paths[SAMPLES * index : SAMPLES * (index + 1)], model.out / f"images/{item}.png")
        results = model.out / RESULTS
        again = (
            f"run DPG-Bench's scorer, accelerate launch dpg_bench/compute_dpg_bench.py --image-root-path "
            f"{(model.out / 'images').resolve()} --resolution {self.config.size[0]} --pic-num {SAMPLES} "
            f"--csv {(self.folder / QUESTIONS).resolve()} --res-path {results.resolve()}, then this command again"
        )
        if not results.is_file():
            raise ValueError(f"{model.name}: the images are ready, but {results} is missing: {again}")
        try:
            scores, items = read_results(results.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{results}: {error}: {again}") from error
        unscored = len(set(self.prompts) - set(items))
        if set(items) - set(self.prompts) or unscored > self.config.max_bad_fraction * len(self.prompts):
            ours = len(set(items) & set(self.prompts))
            raise ValueError(f"{results}: got {len(items)} items, {ours} of the {len(self.prompts)} expected: {again}")
        scores.counts |= {"unscored": unscored, "bad_prompts": self.bad}
        return scores


def _items(path: Path) -> set[str]:
    """Return the items in the benchmark's table of questions. ValueError if the file is not that table."""
    try:
        table = pd.read_csv(path, usecols=["item_id"], dtype=str)
    except (OSError, ValueError) as error:
        raise ValueError(f"prompts={path.parent}: {path} is not DPG-Bench's table of questions: {error}") from error
    return set(table["item_id"].dropna())


def write_grid(paths: list[Path], path: Path) -> None:
    """Write square images as a grid, unless ``path`` is newer than all of them."""
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
    """Parse the scorer's file into scores and each item's mean. ValueError if it is cut off or inconsistent."""
    stated = re.findall(r"^DPG-Bench score: (\S+)$", text, re.MULTILINE)
    if len(stated) != 1:
        raise ValueError("expected one DPG-Bench score at the end")
    lines, _, categories = text.partition("L1 category scores:")
    items: dict[str, float] = {}
    for line in lines.splitlines():
        name, *numbers = line.rsplit(", ", SAMPLES + 1)
        if len(numbers) == SAMPLES + 1:
            if not 0 <= float(numbers[-1]) <= 1:
                raise ValueError(f"{name} has a mean of {numbers[-1]}, expected 0 to 1")
            items[Path(name).stem] = 100 * float(numbers[-1])
        elif not line.startswith("Model: "):
            raise ValueError(f"expected an item's path with {SAMPLES} scores and their mean, got {line!r}")
    means, intervals = summarise({"overall": list(items.values())})
    overall = means["overall"]
    if abs(overall - float(stated[0])) > SAME:
        raise ValueError(f"states a score of {stated[0]}, but the mean of its {len(items)} items is {overall}")
    broad, _, detailed = categories.partition("L2 category scores:")
    by_category = {name.lower(): value for name, value in _numbers(broad).items()}
    scores = Scores({**by_category, "overall": overall}, intervals, {"items": len(items)}, _numbers(detailed))
    return scores, items


def _numbers(text: str) -> dict[str, float]:
    """Parse indented lines of the form "name: value"."""
    return {name: float(value) for name, value in re.findall(r"^\t(.+): ([\d.e-]+)$", text, re.MULTILINE)}
