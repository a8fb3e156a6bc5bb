"""GenEval: images in the layout that its scorer reads, and the scorer's results as our metrics.

``prompts`` is the benchmark's ``evaluation_metadata.jsonl``. The layout is that of the README of
github.com/djghosh13/geneval: line N of the file goes to ``images/<N, five digits>/metadata.jsonl``, four images of it
to ``samples/0000.png`` to ``0003.png``. Its ``evaluation/evaluate_images.py`` (which needs a GPU and mmdet) writes a
line for each image; the scores are those of its ``evaluation/summary_scores.py``: by task the share of right
images, and overall the mean over the tasks.

The papers drew prompts that were rewritten by a language model. ``rewrites`` is a JSON object of prompts and what is
drawn in their place; the metadata that the scorer reads stay as they are.
"""

import json
from collections import defaultdict
from pathlib import Path

from vargpt_rl.data.quarantine import BadRecord
from vargpt_rl.evaluate.report import Column, Scores
from vargpt_rl.evaluate.rows import quarantine_of, read_rows, sift, text
from vargpt_rl.evaluate.settings import EvaluateConfig
from vargpt_rl.evaluate.subject import EvaluatedModel, ImageRequest
from vargpt_rl.storage.files import write_atomically

SAMPLES = 4
RESULTS = "results.jsonl"
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


class GenEval:
    """Four images of every prompt."""

    columns = [Column(name, name.replace("_", " ")) for name in (*TASKS, "overall")]

    def __init__(self, config: EvaluateConfig):
        self.config = config
        self.rows, self.bad = read_rows(config, "prompts", _check)
        drawn = _rewrites(config.rewrites, [row["prompt"] for _, row in self.rows])
        self.wanted = [
            ImageRequest(f"images/{number:05d}/samples/{k:04d}.png", drawn.get(row["prompt"], row["prompt"]), number, k)
            for number, row in self.rows
            for k in range(SAMPLES)
        ]

    def make(self, subject: EvaluatedModel) -> None:
        subject.draw(self.wanted)

    def score(self, subject: EvaluatedModel) -> Scores:
        """ValueError that says how to run the scorer, where there are no results yet or not all of them."""
        subject.paths(self.wanted)
        for number, row in self.rows:
            write_atomically(subject.out / f"images/{number:05d}/metadata.jsonl", json.dumps(row).encode())
        results = subject.out / RESULTS
        again = (
            f"run GenEval's scorer, python evaluation/evaluate_images.py {subject.out.resolve() / 'images'} "
            f"--outfile {results.resolve()} --model-path DETECTOR_FOLDER, then this command again"
        )
        if not results.is_file():
            raise ValueError(f"{subject.name}: the images are drawn, but {results} is not there: {again}")
        rows = self._results(results)
        unscored = len(self.wanted) - len(rows)
        if unscored > self.config.max_bad_fraction * len(self.wanted) or not rows:
            raise ValueError(f"{results}: usable results of {len(rows)} of {len(self.wanted)} images: {again}")
        scores = summary(rows)
        scores.counts |= {"unscored": unscored, "bad_prompts": self.bad}
        return scores

    def _results(self, path: Path) -> list[dict]:
        """The usable lines of the scorer's file, one for each image at most."""
        left = {wanted.file.removeprefix("images/") for wanted in self.wanted}

        def check(row: dict) -> None:
            image = _image(row)
            if image not in left:
                raise BadRecord("result of an image that is not wanted, or a second one")
            left.remove(image)

        return [row for _, row in sift(path, check, quarantine_of(self.config))[0]]


def _check(row: dict) -> None:
    for key in ("prompt", "tag"):
        text(row, key)


def _rewrites(path: str | None, prompts: list[str]) -> dict[str, str]:
    """What is drawn in place of prompts. ValueError where the file is not such a table or lacks a prompt."""
    if path is None:
        return {}
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"rewrites={path}: expected a JSON object of prompts and texts: {error}") from error
    if not isinstance(table, dict) or not all(isinstance(value, str) and value.strip() for value in table.values()):
        raise ValueError(f"rewrites={path}: expected a JSON object of prompts and texts")
    missing = [prompt for prompt in prompts if prompt not in table]
    if missing:
        raise ValueError(f"rewrites={path}: {len(missing)} prompts are not in it, {missing[0]!r} is one")
    return table


def _image(row: dict) -> str:
    """Which image a result is of, as "00000/samples/0000.png"; BadRecord for a malformed result."""
    text(row, "tag")
    text(row, "metadata")
    if not isinstance(row.get("correct"), bool):
        raise BadRecord('"correct" is neither true nor false')
    return "/".join(Path(text(row, "filename")).parts[-3:])


def summary(rows: list[dict]) -> Scores:
    """GenEval's own summary: shares by task, "overall" their mean, and the shares of right images and prompts.

    A prompt counts as right where any image of it is; prompts are told apart by their metadata.
    """
    tasks, prompts = defaultdict(list), defaultdict(list)
    for row in rows:
        tasks[row["tag"]].append(row["correct"])
        prompts[row["metadata"]].append(row["correct"])
    shares = {task: sum(correct) / len(correct) for task, correct in tasks.items()}
    return Scores(
        shares | {"overall": sum(shares.values()) / len(shares)},
        counts={"images": len(rows), "prompts": len(prompts), **{task: len(tasks[task]) for task in tasks}},
        details={
            "correct_images": sum(row["correct"] for row in rows) / len(rows),
            "correct_prompts": sum(any(correct) for correct in prompts.values()) / len(prompts),
        },
    )
