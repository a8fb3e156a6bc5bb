"""GenEval: write images in the layout that its scorer reads, and read the scorer's results.

``prompts`` is the benchmark's ``evaluation_metadata.jsonl``. The layout is that of the README of
github.com/djghosh13/geneval: line N of the file goes to ``images/<N, five digits>/metadata.jsonl``, its four images to
``samples/0000.png`` to ``0003.png``. ``evaluation/evaluate_images.py`` there (which needs a GPU and mmdet) writes one
line per image. Scores are those of ``evaluation/summary_scores.py``: the share of correct images per task, and the mean
over tasks.

The papers used prompts rewritten by a language model. ``rewrites`` is a JSON object that maps each prompt to the text
used instead; the metadata that the scorer reads is unchanged.
"""

import json
from collections import defaultdict
from pathlib import Path

from vargpt_rl.data.quarantine import BadRecord
from vargpt_rl.evaluate.evaluated_model import EvaluatedModel, ImageRequest
from vargpt_rl.evaluate.report import Column, Scores, summarise
from vargpt_rl.evaluate.rows import quarantine_of, read_rows, sift, text
from vargpt_rl.evaluate.settings import EvaluateConfig
from vargpt_rl.storage.files import write_atomically

SAMPLES = 4
RESULTS = "results.jsonl"
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


class GenEval:
    """The benchmark: four images per prompt."""

    columns = [Column(name, name.replace("_", " ")) for name in (*TASKS, "overall")]

    def __init__(self, config: EvaluateConfig):
        self.config = config
        self.rows, self.bad = read_rows(config, "prompts", _check)
        rewrites = _rewrites(config.rewrites, [row["prompt"] for _, row in self.rows])
        self.requests = [
            ImageRequest(
                f"images/{number:05d}/samples/{k:04d}.png", rewrites.get(row["prompt"], row["prompt"]), number, k
            )
            for number, row in self.rows
            for k in range(SAMPLES)
        ]

    def make(self, model: EvaluatedModel) -> None:
        model.draw(self.requests)

    def score(self, model: EvaluatedModel) -> Scores:
        """Read the scorer's results. If they are missing or incomplete, ValueError with the command that makes them."""
        model.paths(self.requests)
        for number, row in self.rows:
            write_atomically(model.out / f"images/{number:05d}/metadata.jsonl", json.dumps(row).encode())
        results = model.out / RESULTS
        again = (
            f"run GenEval's scorer, python evaluation/evaluate_images.py {model.out.resolve() / 'images'} "
            f"--outfile {results.resolve()} --model-path DETECTOR_FOLDER, then this command again"
        )
        if not results.is_file():
            raise ValueError(f"{model.name}: the images are ready, but {results} is missing: {again}")
        rows = self._results(results)
        unscored = len(self.requests) - len(rows)
        if unscored > self.config.max_bad_fraction * len(self.requests) or not rows:
            raise ValueError(f"{results}: {len(rows)} of {len(self.requests)} images have usable results: {again}")
        scores = summary(rows)
        scores.counts |= {"unscored": unscored, "bad_prompts": self.bad}
        return scores

    def _results(self, path: Path) -> list[dict]:
        """Return the usable lines of the scorer's file, at most one per image."""
        remaining = {request.file.removeprefix("images/") for request in self.requests}

        def check(row: dict) -> None:
            image = _image(row)
            if image not in remaining:
                raise BadRecord("result of an unknown image, or a second result of one")
            remaining.remove(image)

        return [row for _, row in sift(path, check, quarantine_of(self.config))[0]]


def _check(row: dict) -> None:
    for key in ("prompt", "tag"):
        text(row, key)


def _rewrites(path: str | None, prompts: list[str]) -> dict[str, str]:
    """Read the text to use instead of each prompt. ValueError if the file is not such a table or lacks a prompt."""
    if path is None:
        return {}
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"rewrites={path}: expected a JSON object that maps prompts to texts: {error}") from error
    if not isinstance(table, dict) or not all(isinstance(value, str) and value.strip() for value in table.values()):
        raise ValueError(f"rewrites={path}: expected a JSON object that maps prompts to texts")
    missing = [prompt for prompt in prompts if prompt not in table]
    if missing:
        raise ValueError(f"rewrites={path}: {len(missing)} prompts are missing, for example {missing[0]!r}")
    return table


def _image(row: dict) -> str:
    """Return the image a result belongs to, as "00000/samples/0000.png". BadRecord for a malformed result."""
    text(row, "tag")
    text(row, "metadata")
    if not isinstance(row.get("correct"), bool):
        raise BadRecord('"correct" is not true or false')
    return "/".join(Path(text(row, "filename")).parts[-3:])


def summary(rows: list[dict]) -> Scores:
    """Summarize as GenEval does: accuracy per task, "overall" their mean, and accuracy over images and over prompts.

    A prompt counts as correct if any of its images is. Prompts are identified by their metadata.
    """
    tasks, prompts, asked = defaultdict(list), defaultdict(list), defaultdict(list)
    for row in rows:
        tasks[row["tag"]].append(row["correct"])
        prompts[row["metadata"]].append(row["correct"])
        asked[row["tag"]].append(row["metadata"])
    groups = {task: [float(right) for right in correct] for task, correct in tasks.items()}
    shares, intervals = summarise(groups, asked)
    return Scores(
        shares | {"overall": sum(shares.values()) / len(shares)},
        intervals,
        counts={"images": len(rows), "prompts": len(prompts), **{task: len(tasks[task]) for task in tasks}},
        details={
            "correct_images": sum(row["correct"] for row in rows) / len(rows),
            "correct_prompts": sum(any(correct) for correct in prompts.values()) / len(prompts),
        },
    )
