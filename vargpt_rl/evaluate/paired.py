"""Scores of held-out images, one line per image, and paired comparisons between moments of a run.

Every moment draws the same prompts with the same seeds, so the difference of two moments is taken image by image: its
standard error lacks the spread between prompts, which is most of the error of either mean. Images of one prompt are not
independent of one another: errors and tests count prompts, by their text. Images of different sizes are different
images: moments of iterations at different resolutions are never compared.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vargpt_rl.common.averages import half_width, mean_and_error
from vargpt_rl.storage.files import write_atomically
from vargpt_rl.storage.lines import as_lines, read_records

ROUNDING = 1e-12
"""Differences of scores up to this size are rounding."""


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

    The error is clustered by prompt (`vargpt_rl.common.averages.mean_and_error`). None if there are no such images.
    """
    prompts, differences = _differences(images, baseline)
    return mean_and_error(differences, prompts) if differences else None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A paired comparison of scores: mean difference, its standard error, and numbers of images by their outcome."""

    gain: float
    error: float
    """Standard error of the gain, clustered by prompt."""
    half_width: float
    """Half the width of the gain's 95 % interval."""
    better: int
    worse: int
    alike: int
    prompts_better: int
    """Prompts whose images are better in sum."""
    prompts_worse: int
    prompts: int
    """Prompts in all."""

    @property
    def p(self) -> float:
        """Two-sided p-value of the exact sign test over prompts, which leaves out those whose images score alike.

        With one image of each prompt, right or wrong, this is McNemar's exact test.
        """
        decided = self.prompts_better + self.prompts_worse
        if decided == 0:
            return 1.0
        from scipy.stats import binomtest

        return float(binomtest(self.prompts_better, decided).pvalue)

    def as_metrics(self, name: str) -> dict[str, float]:
        """Return ``name`` (the gain), and what `vargpt_rl.evaluate.wording.gain_of` reads under ``name_...``."""
        return {
            name: self.gain,
            f"{name}_stderr": self.error,
            f"{name}_half_width": self.half_width,
            f"{name}_better": self.better,
            f"{name}_worse": self.worse,
            f"{name}_alike": self.alike,
            f"{name}_prompts": self.prompts,
            f"{name}_prompts_better": self.prompts_better,
            f"{name}_prompts_worse": self.prompts_worse,
            f"{name}_p": self.p,
        }


def compare(images: Sequence[ScoredImage], baseline: Sequence[ScoredImage]) -> Comparison | None:
    """Compare scores with those of ``baseline``, over images scored at both moments; None if there are none."""
    prompts, differences = _differences(images, baseline)
    if not differences:
        return None
    gain, error = mean_and_error(differences, prompts)
    sums: dict[str, float] = defaultdict(float)
    for prompt, difference in zip(prompts, differences, strict=True):
        sums[prompt] += difference
    of_images, of_prompts = _signs(differences), _signs(sums.values())
    return Comparison(
        gain=gain,
        error=error,
        half_width=half_width(differences, prompts),
        better=of_images[1],
        worse=of_images[-1],
        alike=of_images[0],
        prompts_better=of_prompts[1],
        prompts_worse=of_prompts[-1],
        prompts=len(sums),
    )


def _signs(values: Iterable[float]) -> Counter[int]:
    """Count values by their sign; what rounding leaves of 0 is 0."""
    return Counter((value > ROUNDING) - (value < -ROUNDING) for value in values)


def _differences(images: Sequence[ScoredImage], baseline: Sequence[ScoredImage]) -> tuple[list[str], list[float]]:
    """Return prompts and differences of scores, of images scored at both moments."""
    known = {image.key: image.score for image in baseline}
    found = [(image.prompt, image.score, known.get(image.key)) for image in images]
    both = [(prompt, new - old) for prompt, new, old in found if new is not None and old is not None]
    return [prompt for prompt, _ in both], [difference for _, difference in both]
