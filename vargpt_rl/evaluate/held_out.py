"""Held-out measures of a policy: what its images show, and what it prefers. Pure functions of what workers return."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vargpt_rl.data.samples import Prompt
from vargpt_rl.data.sources import Source


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
