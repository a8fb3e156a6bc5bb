"""Held-out measures of a policy: what its images show, and what it prefers. Pure functions of what workers return."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vargpt_rl.data.shapes import parse
from vargpt_rl.data.sources import Source
from vargpt_rl.data.types import Prompt
from vargpt_rl.evaluate.checker import check


def shapes_check(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """1.0 where an image shows exactly what its caption demands, else 0.0."""
    return [float(check(image, prompt).correct) for image, prompt in zip(images, prompts, strict=True)]


@dataclass(frozen=True)
class Fidelity:
    """Peak signal-to-noise ratio, in dB, of images against those of a source; a prompt's id is the image's key.

    Equal images count as 100 dB.
    """

    source: Source
    side: int

    def __call__(self, images: list[Image.Image], prompts: list[Prompt]) -> list[float]:
        ratios = []
        for image, prompt in zip(images, prompts, strict=True):
            error = np.asarray(image, float) - np.asarray(self.source.load(prompt.id, self.side), float)
            ratios.append(float(10 * np.log10(255**2 / max(np.square(error).mean(), 255**2 * 1e-10))))
        return ratios


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error. ValueError for no values: a score of nothing is not zero."""
    if not values:
        raise ValueError("no values to average: nothing was scored")
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return float(np.mean(values)), spread / math.sqrt(len(values))


def task_scores(prompts: Sequence[str], correct: Sequence[float]) -> dict[str, float]:
    """Share of right images by task of the shapes world, over all ("overall") and its standard error."""
    by_task = defaultdict(list)
    for prompt, value in zip(prompts, correct, strict=True):
        by_task[parse(prompt).task].append(value)
    overall, error = mean_and_error(list(correct))
    tasks = {task: float(np.mean(values)) for task, values in sorted(by_task.items())}
    return {"overall": overall, "overall_stderr": error, "n": len(correct), **tasks}


def preference_scores(
    chosen: Sequence[float],
    rejected: Sequence[float],
    reference_chosen: Sequence[float],
    reference_rejected: Sequence[float],
    beta: float,
) -> dict[str, float]:
    """DPO's own measures on pairs that were not trained on, from summed log-probabilities in nats.

    ``margin`` is beta x the mean log-ratio difference, ``accuracy`` the share of pairs where it is above 0;
    ``chosen_logp_change`` tells whether the winners themselves became likelier (nats an image).
    """
    change_chosen = np.subtract(chosen, reference_chosen)
    margins = beta * (change_chosen - np.subtract(rejected, reference_rejected))
    return {
        "margin": float(margins.mean()),
        "accuracy": float((margins > 0).mean()),
        "chosen_logp": float(np.mean(chosen)),
        "chosen_logp_change": float(change_chosen.mean()),
    }
