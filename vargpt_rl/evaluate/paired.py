"""Scores of held-out images, one line per image, and paired comparisons between moments of a run.

Every moment draws the same prompts with the same seeds, so the difference of two moments is taken image by image: its
standard error lacks the spread between prompts, which is most of the error of either mean. Images of different sizes
are different images: moments of iterations at different resolutions are never compared.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vargpt_rl.common.averages import mean_and_error
from vargpt_rl.storage.files import write_atomically
from vargpt_rl.storage.lines import as_lines, read_records


@dataclass(frozen=True, kw_only=True)
class ScoredImage:
    """One held-out image and its scores; None where a judge gave none, or does not exist."""

    prompt_id: str
    prompt: str
    seed: int
    score: float | None
    """Score whose mean is "overall"."""
    judge: float | None = None
    reward: float | None = None
    skill: str | None = None
    """What the prompt tests, by the source's exact check."""
    reason: str | None = None
    """What the exact check found wrong; empty if nothing."""
    image: str | None = None
    """File of the image, shrunk, relative to the run directory; None if it is not kept."""

    @property
    def key(self) -> tuple[str, int]:
        """Prompt and seed, which identify the image at every moment."""
        return self.prompt_id, self.seed


def write_scores(path: Path, images: Sequence[ScoredImage]) -> None:
    """Write one JSON line per image, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, as_lines([asdict(image) for image in images]).encode())


def read_scores(path: Path) -> list[ScoredImage]:
    """Read what `write_scores` wrote; empty if there is no file. ValueError naming a file that is damaged."""
    try:
        return [ScoredImage(**record) for record in read_records(path)]
    except TypeError as error:
        raise ValueError(f"{path}: not scores of held-out images: {error}") from error


def paired_gain(images: Sequence[ScoredImage], baseline: Sequence[ScoredImage]) -> tuple[float, float] | None:
    """Return the mean difference of scores to ``baseline`` and its standard error, over images scored at both moments.

    None if there are none.
    """
    differences = _differences(images, baseline)
    return mean_and_error(differences) if differences else None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A paired comparison of scores: mean difference, its standard error, and numbers of images by their outcome."""

    gain: float
    error: float
    better: int
    worse: int
    alike: int

    @property
    def p(self) -> float:
        """Two-sided p-value of the exact sign test, which leaves out images that score alike.

        For right and wrong images this is McNemar's exact test.
        """
        if self.better + self.worse == 0:
            return 1.0
        from scipy.stats import binomtest

        return float(binomtest(self.better, self.better + self.worse).pvalue)

    def as_metrics(self, name: str) -> dict[str, float]:
        """Return ``name`` (the gain), ``name_stderr``, ``name_better``, ``name_worse``, ``name_alike``, ``name_p``."""
        return {
            name: self.gain,
            f"{name}_stderr": self.error,
            f"{name}_better": self.better,
            f"{name}_worse": self.worse,
            f"{name}_alike": self.alike,
            f"{name}_p": self.p,
        }


def compare(images: Sequence[ScoredImage], baseline: Sequence[ScoredImage]) -> Comparison | None:
    """Compare scores with those of ``baseline``, over images scored at both moments; None if there are none."""
    differences = _differences(images, baseline)
    if not differences:
        return None
    gain, error = mean_and_error(differences)
    signs = Counter((value > 0) - (value < 0) for value in differences)
    return Comparison(gain=gain, error=error, better=signs[1], worse=signs[-1], alike=signs[0])


def _differences(images: Sequence[ScoredImage], baseline: Sequence[ScoredImage]) -> list[float]:
    """Return the differences of scores, over images scored at both moments."""
    known = {image.key: image.score for image in baseline}
    pairs = [(image.score, known.get(image.key)) for image in images]
    return [new - old for new, old in pairs if new is not None and old is not None]
