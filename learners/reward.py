"""Learn a reward from pairs of images: a ``trl.RewardTrainer``, whose Bradley-Terry loss is TRL's own.

-log sigmoid(r(chosen) - r(rejected)) + center (r(chosen) + r(rejected))^2. The head starts at 0, so the first loss is
ln 2.
"""

from pathlib import Path

from datasets import Dataset
from trl import RewardTrainer

from learners.config import UNDERSTANDING, LearnedRewardConfig
from learners.resume import Resumable
from learners.step_times import TimedSteps
from vargpt_rl.data.reward_pairs import read_pairs_file
from vargpt_rl.model.parts import VISION, VISION_PROJECTOR
from vargpt_rl.model.reward_model import HEAD
from vargpt_rl.model.unified import Unified

PREFIXES = dict(zip(UNDERSTANDING, (("model.language_model.",), VISION, VISION_PROJECTOR), strict=True))
"""Prefixes of the tensors of each part, in both families."""


class ShownImageRewardTrainer(TimedSteps, Resumable, RewardTrainer):
    """TRL's trainer on pairs of shown images, which its collator loads."""

    survivors = ("_total_train_tokens",)

    def _prepare_dataset(self, dataset, *args):
        return dataset  # the collator makes the tokens


def pairs_dataset(folder: Path) -> Dataset:
    """Return a folder's pairs as a dataset."""
    return Dataset.from_list(read_pairs_file(folder))


def train_parts(model: Unified, settings: LearnedRewardConfig) -> list[str]:
    """Let the head and ``settings.trains`` train, if a loss can reach them; return their names, sorted."""
    prefixes = tuple(prefix for part in settings.trains for prefix in PREFIXES[part])
    for name, parameter in model.named_parameters():
        in_part = bool(prefixes) and name.startswith(prefixes) and not name.startswith(model.unreached)
        parameter.requires_grad_(name == HEAD or in_part)
    return sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
