"""Scores of held-out images, one line per image, and paired comparisons between moments of a run.

Every moment draws the same prompts with the same seeds, so the difference of two moments is taken image by image: its
standard error lacks the spread between prompts, which is most of the error of either mean.
"""

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
    known = {image.key: image.score for image in baseline}
    pairs = [(image.score, known.get(image.key)) for image in images]
    differences = [new - old for new, old in pairs if new is not None and old is not None]
    return mean_and_error(differences) if differences else None
