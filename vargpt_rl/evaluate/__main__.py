"""Measure checkpoints: ``python -m vargpt_rl.evaluate checkpoint=DIR benchmark=NAME [key=value ...]``.

Generates missing images and answers, scores them, prints a table, and writes the table to ``out``/NAME.md and all
numbers to ``out``/NAME.json. ``checkpoints=[A,B]`` are measured side by side, on the same prompts and seeds. Repeating
the command resumes it. With ``num_shards=N shard=k``, N processes generate one part each; the command without these
keys scores the result. Exit codes: 0 done, 1 failed, 2 a setting or an input is wrong or missing.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Protocol

from vargpt_rl.common.command import run_command
from vargpt_rl.evaluate.dpg import DpgBench
from vargpt_rl.evaluate.evaluated_model import EvaluatedModel
from vargpt_rl.evaluate.fid import FrechetDistance
from vargpt_rl.evaluate.geneval import GenEval
from vargpt_rl.evaluate.geneval2 import GenEval2
from vargpt_rl.evaluate.questions import QuestionFile
from vargpt_rl.evaluate.report import Column, Scores, write_report
from vargpt_rl.evaluate.rows import quarantine_of
from vargpt_rl.evaluate.scorers import clip_score, hps
from vargpt_rl.evaluate.settings import Benchmark, EvaluateConfig
from vargpt_rl.evaluate.shapes import Shapes
from vargpt_rl.evaluate.understanding import Understanding
from vargpt_rl.inference.images import make_folder
from vargpt_rl.model.drawing_defaults import read_defaults

logger = logging.getLogger(__name__)

DRAW_NOTHING = (Benchmark.questions, Benchmark.lmms)


class Measurement(Protocol):
    """A benchmark with its inputs, read and checked."""

    @property
    def columns(self) -> list[Column]: ...

    def make(self, model: EvaluatedModel) -> None:
        """Generate what is scored: this process's part of it."""
        ...

    def score(self, model: EvaluatedModel) -> Scores:
        """Score what every process has generated."""
        ...


BENCHMARKS: dict[Benchmark, Callable[[EvaluateConfig], Measurement]] = {
    Benchmark.shapes: Shapes,
    Benchmark.geneval: GenEval,
    Benchmark.geneval2: GenEval2,
    Benchmark.dpg: DpgBench,
    Benchmark.clip: clip_score,
    Benchmark.hps: hps,
    Benchmark.fid: FrechetDistance,
    Benchmark.questions: QuestionFile,
    Benchmark.lmms: Understanding,
}


def evaluate(config: EvaluateConfig) -> None:
    """Measure every checkpoint. Before loading a model, raise ValueError naming the key or file that is wrong."""
    make_folder(str(config.folder))
    quarantine_of(config).path.unlink(missing_ok=True)
    benchmark = BENCHMARKS[config.benchmark](config)
    models = [EvaluatedModel(config, name) for name in config.checkpoints]
    for told in [] if config.benchmark in DRAW_NOTHING else other_resolutions(models, config.resolution):
        logger.warning(told)
    for model in models:
        benchmark.make(model)
        model.release()
    if config.num_shards > 1:
        print(
            f"part {config.shard} of {config.num_shards} is done; run the command without num_shards to score all parts"
        )
        return
    rows: dict[str, Scores] = {model.name: benchmark.score(model) for model in models}
    about = {
        model.name: {"checkpoint": model.name, "weights": model.weights, "folder": str(model.out.resolve())}
        for model in models
    }
    settings = {key: value for key, value in asdict(config).items() if value not in (None, [])}
    settings["benchmark"] = config.benchmark.value
    print(
        write_report(
            config.folder.parent,
            config.benchmark.value,
            settings=settings,
            columns=benchmark.columns,
            rows=rows,
            models=about,
        )
    )


def other_resolutions(models: list[EvaluatedModel], resolution: int | None) -> list[str]:
    """Say which checkpoints were trained and measured at another resolution than that of this evaluation."""
    own = {model.name: read_defaults(model.path).resolution for model in models}
    return [
        f"{name} draws at {pixels} px, but is measured at {resolution} px here: resolution={pixels} changes that"
        for name, pixels in own.items()
        if pixels not in (None, resolution)
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(EvaluateConfig, evaluate, arguments)


if __name__ == "__main__":
    sys.exit(main())
