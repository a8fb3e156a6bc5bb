"""Metrics of a run's policy on held-out prompts and pairs, computed from the results that workers return."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vargpt_rl.common.averages import with_interval
from vargpt_rl.data.samples import Prompt
from vargpt_rl.data.sources import Source


@dataclass(frozen=True)
class Fidelity:
    """Peak signal-to-noise ratio, in dB, of images against the source's; a prompt's id is its image's key.

    Identical images count as 100 dB.
    """

    source: Source
    side: int

    def __call__(self, images: list[Image.Image], prompts: list[Prompt]) -> list[float]:
        ratios = []
        for image, prompt in zip(images, prompts, strict=True):
            error = np.asarray(image, float) - np.asarray(self.source.load(prompt.id, self.side), float)
            ratios.append(float(10 * np.log10(255**2 / max(np.square(error).mean(), 255**2 * 1e-10))))
        return ratios


def preference_scores(
    chosen: Sequence[float],
    rejected: Sequence[float],
    reference_chosen: Sequence[float],
    reference_rejected: Sequence[float],
    beta: float,
    prompts: Sequence[str] | None = None,
) -> dict[str, float]:
    """Compute DPO's metrics on held-out pairs from summed log-probabilities in nats.

    ``margin`` is beta x the mean log-ratio difference, ``accuracy`` the share of pairs where it is above 0, with its
    95 % interval, for which pairs of one of ``prompts`` are not independent; ``chosen_logp_change`` shows whether the
    chosen images became more likely (nats per image).
    """
    change_chosen = np.subtract(chosen, reference_chosen)
    margins = beta * (change_chosen - np.subtract(rejected, reference_rejected))
    return {
        "margin": float(margins.mean()),
        **with_interval("accuracy", [float(margin > 0) for margin in margins], prompts),
        "chosen_logp": float(np.mean(chosen)),
        "chosen_logp_change": float(change_chosen.mean()),
    }
