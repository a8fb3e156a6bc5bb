"""Settings of rewards and of preference pairs. No heavy imports, so that a bad setting fails at once."""

from dataclasses import dataclass, field
from typing import Any

from rewards.preferences import HUMAN, OWN_SAMPLES
from vargpt_rl.common.settings import Count, Line


@dataclass
class RewardConfig:
    """A reward plug-in.

    Several rewards: ``rewards.combined:WeightedSum``, whose ``options.terms`` are named rewards with the keys of
    ``rewards.processes.RewardTerm``.
    """

    path: Line | None = None
    """``module:Name`` or ``file.py:name``; null scores nothing."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of a class's constructor, or keyword-only arguments of a function."""


@dataclass
class PreferenceConfig:
    """Preference pairs of an iteration."""

    builder: Line = "rewards.preferences:external_winner"
    """Preference builder: ``module:name`` or ``file.py:name``."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the builder."""
    winners: Line | None = None
    """Folder of the stronger system's images.

    Matched by file name (captioned data) or by the prompt's id, as in ``<id>.png`` (records; a held-out record without
    one there has its own image as winner). Letter case, Unicode normal form and ending may differ.
    """
    pairs: Line | None = None
    """File or folder of pairs that people have judged: two images, a prompt, who won (Pick-a-Pic, HPDv2, JSON lines).

    All of them replace samples, winners and builder: nothing is drawn for pairs. See docs/preferences.md.
    """
    pair_images: Line | None = None
    """Folder in which the images that ``pairs`` names are; null is the folder of the file."""
    prompts: Line | None = None
    """File of prompts, instead of the data source's own."""
    count: Count = 128
    """Prompts per iteration."""
    samples: Count = 1
    """Samples of each prompt."""

    @property
    def asks_people(self) -> bool:
        """Tell whether people label the pairs."""
        return self.builder == HUMAN

    @property
    def uses_winners(self) -> bool:
        """Tell whether pairs are made of a stronger system's images."""
        among_samples = self.asks_people and self.options.get("against", "samples") == "samples"
        return self.pairs is None and self.builder != OWN_SAMPLES and not among_samples
