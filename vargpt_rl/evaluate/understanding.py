"""The papers' understanding benchmarks, run by lmms-eval in its own environment (see `lmms`).

``tasks`` are lmms-eval's names; the default is the papers' eleven benchmarks (VARGPT-v1.1, section 5). ``python`` is
the interpreter of the environment with lmms-eval and this package. The papers' benchmarks are reported as in the
papers: MME's perception score, SEED-Bench on images, all others in percent. Other tasks are reported unchanged.
lmms-eval gets its datasets from the hub or from the cache. MMBench asks a judge (OPENAI_API_KEY) about answers that are
not plainly one of the options; ``mmbench_en_dev_static`` needs no judge.
"""

import json
import subprocess
import sys
from dataclasses import dataclass

from vargpt_rl.common.command import CommandFailed
from vargpt_rl.evaluate.evaluated_model import EvaluatedModel
from vargpt_rl.evaluate.report import Column, Scores
from vargpt_rl.evaluate.settings import EvaluateConfig
from vargpt_rl.evaluate.wording import Z
from vargpt_rl.inference.images import check_unchanged


@dataclass(frozen=True)
class Published:
    """A column of the papers' tables: the task's metric, times ``scale``."""

    column: str
    heading: str
    metric: str
    scale: float = 100.0
    decimals: int = 2


TASKS = {
    "mmbench_en_dev": Published("mmbench", "MMBench", "gpt_eval_score", 1.0),
    "seedbench": Published("seed", "SEED", "seed_image"),
    "mmmu_val": Published("mmmu", "MMMU", "mmmu_acc"),
    "pope_adv": Published("pope_adv", "POPE adv", "pope_accuracy"),
    "pope_pop": Published("pope_pop", "POPE pop", "pope_accuracy"),
    "pope_random": Published("pope_rand", "POPE rand", "pope_accuracy"),
    "mme": Published("mme", "MME", "mme_perception_score", 1.0, 1),
    "gqa": Published("gqa", "GQA", "exact_match"),
    "textvqa_val": Published("textvqa", "TextVQA", "exact_match"),
    "vqav2_val": Published("vqav2", "VQAv2", "exact_match"),
    "scienceqa_img": Published("sciqa", "SciQA-img", "exact_match"),
    "ok_vqa_val2014": Published("okvqa", "OKVQA", "exact_match"),
    "vizwiz_vqa_val": Published("vizwiz", "VizWizQA", "exact_match"),
}
"""Tasks of the papers' eleven benchmarks; POPE has three."""
SAME = {"mmbench_en_dev_static": "mmbench_en_dev"}
"""Variants of a task, reported in the same column."""


class Understanding:
    """The benchmark: tasks of lmms-eval."""

    columns = [Column(own.column, own.heading, own.decimals) for own in TASKS.values()]

    def __init__(self, config: EvaluateConfig):
        if config.num_shards > 1:
            raise ValueError(f"num_shards={config.num_shards}: benchmark=lmms runs in one process, expected 1")
        self.config = config
        self.tasks = config.tasks or list(TASKS)
        self.python = config.python or sys.executable

    def _run(self, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run([self.python, *arguments], text=True, **options)
        except OSError as error:
            raise ValueError(f"python={self.python}: {error.strerror}") from error

    def _check_environment(self) -> None:
        """Raise ValueError with instructions if lmms-eval or this package is missing."""
        found = self._run("-c", "import vargpt_rl.evaluate.lmms, lmms_eval.evaluator", capture_output=True)
        if found.returncode:
            reason = (found.stderr.strip().splitlines() or ["no error message"])[-1]
            raise ValueError(
                f"python={self.python}: cannot import lmms-eval there ({reason}): create an environment with "
                "lmms-eval and this package, installed with --no-deps (docs/evaluation.md), and set python=..."
            )

    def _about(self, model: EvaluatedModel, task: str) -> dict:
        return {"task": task, "weights": model.weights, "dtype": model.dtype, "limit": self.config.limit}

    def make(self, model: EvaluatedModel) -> None:
        """Run the tasks that have no results yet. Raises CommandFailed if lmms-eval fails."""
        missing = [task for task in self.tasks if not self._results(model, task)]
        if not missing:
            return
        self._check_environment()
        job = {
            "checkpoint": str(model.path),
            "device": self.config.device,
            "dtype": self.config.dtype,
            "batch_size": self.config.batch_size,
            "limit": self.config.limit,
            "tasks": missing,
            "include": self.config.include,
            "out": str(model.out.resolve()),
            "weights": model.weights,
            "about": {task: self._about(model, task) for task in missing},
        }
        code = self._run("-m", "vargpt_rl.evaluate.lmms", json.dumps(job)).returncode
        if code:
            raise CommandFailed(f"lmms-eval failed with exit code {code}, see its output above")

    def _results(self, model: EvaluatedModel, task: str) -> dict | None:
        """Read lmms-eval's results of a task, if any. ValueError if they belong to other settings."""
        path = model.out / f"{task}.json"
        if not path.exists():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        check_unchanged(model.out, path.name, self._about(model, task), found["about"])
        return found

    def score(self, model: EvaluatedModel) -> Scores:
        """Collect the results. ValueError if a task has none."""
        scores = Scores({})
        for task in self.tasks:
            found = self._results(model, task)
            if found is None:
                raise ValueError(f"{model.out / task}.json: lmms-eval wrote no results")
            scores.details[task] = found["results"]
            scores.counts |= {name: samples["effective"] for name, samples in found["n-samples"].items()}
            figures = numbers(found["results"].get(task, {}))
            own = TASKS.get(SAME.get(task, task))
            if own is None:
                scores.metrics |= {f"{task} {name}": value for name, value in figures.items() if "_stderr" not in name}
                continue
            if own.metric not in figures:
                raise ValueError(f"{model.out / task}.json: expected the metric {own.metric}, got {figures}")
            scores.metrics[own.column] = own.scale * figures[own.metric]
            if (error := figures.get(f"{own.metric}_stderr")) is not None:
                value, half = scores.metrics[own.column], own.scale * Z * error
                scores.intervals[own.column] = (value - half, value + half)
        return scores


def numbers(results: dict) -> dict[str, float]:
    """Keep the numbers of a task's results by metric; lmms-eval's keys are "metric,filter"."""
    return {key.partition(",")[0]: float(value) for key, value in results.items() if isinstance(value, int | float)}
