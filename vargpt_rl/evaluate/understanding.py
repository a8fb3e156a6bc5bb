"""The papers' understanding benchmarks by lmms-eval, which runs in an environment of its own (see `lmms`).

``tasks`` are lmms-eval's names; by default those of the papers' eleven benchmarks (VARGPT-v1.1, section 5). ``python``
is the interpreter of the environment that has lmms-eval and this package. Scores of the papers' benchmarks are given as
there: MME's perception score, SEED-Bench on images, all others in percent. Those of further tasks are given as they
are. lmms-eval fetches its data sets from the hub or finds them in the cache. MMBench asks a judge (OPENAI_API_KEY)
about answers that are no plain option; ``mmbench_en_dev_static`` does without.
"""

import json
import subprocess
import sys
from dataclasses import dataclass

from vargpt_rl.evaluate.report import Column, Scores
from vargpt_rl.evaluate.settings import EvaluateConfig
from vargpt_rl.evaluate.subject import EvaluatedModel
from vargpt_rl.inference.images import check_unchanged


@dataclass(frozen=True)
class Published:
    """How a score of the papers' tables is found: the task's metric, times ``scale``."""

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
"""The tasks of the papers' eleven benchmarks; POPE has three."""
SAME = {"mmbench_en_dev_static": "mmbench_en_dev"}
"""Tasks that measure the same in another way."""


class Understanding:
    """Tasks of lmms-eval."""

    columns = [Column(own.column, own.heading, own.decimals) for own in TASKS.values()]

    def __init__(self, config: EvaluateConfig):
        if config.num_shards > 1:
            raise ValueError(f"num_shards={config.num_shards}: benchmark=lmms runs in one process")
        self.config, self.tasks, self.python = config, config.tasks or list(TASKS), config.python or sys.executable

    def _run(self, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run([self.python, *arguments], text=True, **options)
        except OSError as error:
            raise ValueError(f"python={self.python}: {error.strerror}") from error

    def _check_environment(self) -> None:
        """ValueError that says what to do, where lmms-eval or this package is missing."""
        found = self._run("-c", "import vargpt_rl.evaluate.lmms, lmms_eval.evaluator", capture_output=True)
        if found.returncode:
            reason = (found.stderr.strip().splitlines() or ["it ended without a word"])[-1]
            raise ValueError(
                f"python={self.python}: lmms-eval cannot be used there ({reason}): make an environment with lmms-eval "
                "and, installed with --no-deps, this package (README, Evaluation), and name its interpreter"
            )

    def _about(self, subject: EvaluatedModel, task: str) -> dict:
        return {"task": task, "weights": subject.weights, "dtype": subject.dtype, "limit": self.config.limit}

    def make(self, subject: EvaluatedModel) -> None:
        """Run the tasks that have no results yet. CalledProcessError where lmms-eval fails."""
        missing = [task for task in self.tasks if not self._results(subject, task)]
        if not missing:
            return
        self._check_environment()
        job = {
            "checkpoint": str(subject.path),
            "device": self.config.device,
            "dtype": self.config.dtype,
            "batch_size": self.config.batch_size,
            "limit": self.config.limit,
            "tasks": missing,
            "include": self.config.include,
            "out": str(subject.out.resolve()),
            "weights": subject.weights,
            "about": {task: self._about(subject, task) for task in missing},
        }
        self._run("-m", "vargpt_rl.evaluate.lmms", json.dumps(job), check=True)

    def _results(self, subject: EvaluatedModel, task: str) -> dict | None:
        """lmms-eval's results of a task, if there are any. ValueError where they are of other settings."""
        path = subject.out / f"{task}.json"
        if not path.exists():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        check_unchanged(subject.out, path.name, self._about(subject, task), found["about"])
        return found

    def score(self, subject: EvaluatedModel) -> Scores:
        """ValueError where a task has no results."""
        scores = Scores({})
        for task in self.tasks:
            found = self._results(subject, task)
            if found is None:
                raise ValueError(f"{subject.out / task}.json: lmms-eval wrote no results")
            scores.details[task] = found["results"]
            scores.counts |= {name: samples["effective"] for name, samples in found["n-samples"].items()}
            figures = numbers(found["results"].get(task, {}))
            own = TASKS.get(SAME.get(task, task))
            if own is None:
                scores.metrics |= {f"{task} {name}": value for name, value in figures.items() if "_stderr" not in name}
                continue
            if own.metric not in figures:
                raise ValueError(f"{subject.out / task}.json: lmms-eval gives {figures}, expected {own.metric}")
            scores.metrics[own.column] = own.scale * figures[own.metric]
            if (error := figures.get(f"{own.metric}_stderr")) is not None:
                scores.errors[own.column] = own.scale * error
        return scores


def numbers(results: dict) -> dict[str, float]:
    """What is a number in lmms-eval's results of a task, whose keys are "metric,filter"."""
    return {key.partition(",")[0]: float(value) for key, value in results.items() if isinstance(value, int | float)}
