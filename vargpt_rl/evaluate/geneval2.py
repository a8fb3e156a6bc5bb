"""GenEval 2: write one image per prompt and the scorer's input files, and read the scorer's results.

``prompts`` is the benchmark's ``geneval2_data.jsonl`` (github.com/facebookresearch/GenEval2; keys "prompt",
"atom_count", "vqa_list" and "skills"). ``evaluation.py`` there takes the prompts and a JSON object that maps prompts to
image files, and writes a list of scores per prompt: one score from 0 to 1 for each question of its "vqa_list". Metrics,
in percent: Soft-TIFA AM, the mean over prompts of the arithmetic mean of their scores; Soft-TIFA GM, that of their
geometric mean; and as in ``soft_tifa_analysis.py`` the mean score of each skill, and GM by "atom_count".
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.stats import gmean

from vargpt_rl.data.quarantine import BadRecord
from vargpt_rl.evaluate.evaluated_model import EvaluatedModel, ImageRequest
from vargpt_rl.evaluate.report import Column, Scores, summarise
from vargpt_rl.evaluate.rows import different, read_rows, text
from vargpt_rl.evaluate.settings import EvaluateConfig
from vargpt_rl.storage.files import write_atomically

RESULTS, IMAGES, PROMPTS = "score_lists.json", "images.json", "prompts.jsonl"
SKILLS = ("object", "attribute", "count", "position", "verb")


class GenEval2:
    """The benchmark: one image per prompt."""

    columns = [Column("soft_tifa_am", "Soft-TIFA AM"), Column("soft_tifa_gm", "Soft-TIFA GM")]
    columns += [Column(skill, skill) for skill in SKILLS]

    def __init__(self, config: EvaluateConfig):
        self.rows, self.bad = read_rows(config, "prompts", different(_check, "prompt"))
        self.requests = [ImageRequest(f"images/{number:05d}.png", row["prompt"], number) for number, row in self.rows]

    def make(self, model: EvaluatedModel) -> None:
        model.draw(self.requests)

    def score(self, model: EvaluatedModel) -> Scores:
        """Read the scorer's results. If they are missing or wrong, ValueError with the command that makes them."""
        paths = [str(path.resolve()) for path in model.paths(self.requests)]
        images = {request.prompt: path for request, path in zip(self.requests, paths, strict=True)}
        rows = [row for _, row in self.rows]
        write_atomically(model.out / IMAGES, json.dumps(images, indent=2).encode())
        write_atomically(model.out / PROMPTS, "".join(json.dumps(row) + "\n" for row in rows).encode())
        results = model.out / RESULTS
        again = (
            f"run GenEval 2's scorer, python evaluation.py --benchmark_data {(model.out / PROMPTS).resolve()} "
            f"--image_filepath_data {(model.out / IMAGES).resolve()} --method soft_tifa_gm "
            f"--output_file {results.resolve()}, then this command again"
        )
        if not results.is_file():
            raise ValueError(f"{model.name}: the images are ready, but {results} is missing: {again}")
        try:
            lists = read_scores(results, rows)
        except ValueError as error:
            raise ValueError(f"{results}: {error}: {again}") from error
        scores = soft_tifa(lists, rows)
        scores.counts["bad_prompts"] = self.bad
        return scores


def _check(row: dict) -> None:
    text(row, "prompt")
    questions, skills = row.get("vqa_list"), row.get("skills")
    if not isinstance(questions, list) or not questions:
        raise BadRecord('"vqa_list" is not a list of questions')
    if not isinstance(skills, list) or len(skills) != len(questions) or not set(skills) <= set(SKILLS):
        raise BadRecord('"skills" does not name a known skill for each question')
    if type(row.get("atom_count")) is not int:
        raise BadRecord('"atom_count" is not an integer')


def read_scores(path: Path, rows: list[dict]) -> list[list[float]]:
    """Read the scorer's lists. ValueError unless there is one per prompt, with a number from 0 to 1 per question."""
    lists = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(lists, list):
        raise ValueError("expected a list of lists")
    if len(lists) != len(rows):
        raise ValueError(f"expected {len(rows)} lists of scores, one per prompt, got {len(lists)}")
    for own, row in zip(lists, rows, strict=True):
        if not isinstance(own, list) or len(own) != len(row["vqa_list"]):
            raise ValueError(f"expected {len(row['vqa_list'])} scores for {row['prompt']!r}")
        # Scores are sums of probabilities, which rounding may push slightly above 1.
        if not all(isinstance(score, int | float) and 0 <= score <= 1 + 1e-3 for score in own):
            raise ValueError(f"expected scores from 0 to 1 for {row['prompt']!r}, got {own}")
    return lists


def soft_tifa(lists: list[list[float]], rows: list[dict]) -> Scores:
    """Compute the benchmark's metrics, in percent."""
    with np.errstate(divide="ignore"):  # a score of 0 makes the geometric mean 0
        geometric = [100 * float(gmean(own)) for own in lists]
    arithmetic = [100 * sum(own) / len(own) for own in lists]
    skills, atoms = defaultdict(list), defaultdict(list)
    for own, mean, row in zip(lists, geometric, rows, strict=True):
        atoms[row["atom_count"]].append(mean)
        for score, skill in zip(own, row["skills"], strict=True):
            skills[skill].append(100 * score)
    means, intervals = summarise({"soft_tifa_am": arithmetic, "soft_tifa_gm": geometric})
    return Scores(
        means | {skill: float(np.mean(skills[skill])) for skill in skills},
        intervals,
        {"prompts": len(rows), **{skill: len(skills[skill]) for skill in skills}},
        {"soft_tifa_gm_by_atoms": {str(count): float(np.mean(atoms[count])) for count in sorted(atoms)}},
    )
