"""CLIP score and HPSv2 of images of one's own prompts, by the rewards of the same names.

Both are cosines of image and prompt and are given times a hundred, as usual. ``prompts`` is a .txt or .jsonl file.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from vargpt_rl.common.averages import mean_and_error
from vargpt_rl.common.plugins import make_plugin
from vargpt_rl.data.images import read_image
from vargpt_rl.data.sources import prompts_from_file
from vargpt_rl.evaluate.report import Column, Scores
from vargpt_rl.evaluate.rows import quarantine_of
from vargpt_rl.evaluate.settings import EvaluateConfig
from vargpt_rl.evaluate.subject import EvaluatedModel, ImageRequest
from vargpt_rl.inference.conversation import device_and_dtype

BATCH = 16  # images that are scored at once


def read_prompts(config: EvaluateConfig) -> tuple[list[str], int]:
    """The first ``limit`` prompts, and how many lines are bad. ValueError for too many of those or no prompt."""
    quarantine = quarantine_of(config)
    before = quarantine.lost
    try:
        prompts = prompts_from_file(Path(config.prompts), quarantine)
    except ValueError as error:
        raise ValueError(f"prompts={error}") from error
    bad = quarantine.lost - before
    quarantine.check(len(prompts) + bad, config.max_bad_fraction, bad)
    return [prompt.text for prompt in prompts][: config.limit], bad


def image_of_each(prompts: list[str]) -> list[ImageRequest]:
    return [ImageRequest(f"images/{i:05d}.png", prompt, i) for i, prompt in enumerate(prompts)]


def batched(paths: list[Path], label: str) -> Iterator[list[Image.Image]]:
    """The images, some at a time, with a bar."""
    remaining = iter(tqdm(paths, label, unit="image"))
    while batch := list(islice(remaining, BATCH)):
        yield [read_image(path) for path in batch]


class Rewarded:
    """The mean of a reward, times a hundred. The reward is tried before anything is drawn."""

    def __init__(self, config: EvaluateConfig, metric: str, heading: str, path: str, options: dict[str, str | None]):
        self.config, self.metric, self.columns = config, metric, [Column(metric, heading)]
        self.prompts, self.bad = read_prompts(config)
        self.wanted = image_of_each(self.prompts)
        given = {key: value for key, value in options.items() if value is not None}
        device, _ = device_and_dtype(config.device, config.dtype)
        self.reward = make_plugin(path, {**given, "device": str(device)})
        if config.num_shards == 1:
            try:
                self.reward([Image.new("RGB", config.size)], self.prompts[:1])
            except (OSError, ValueError) as error:
                said = next(iter(str(error).splitlines()), "")
                names = " ".join(f"{key}={value}" for key, value in given.items())
                raise ValueError(f"{path} cannot be used with {names or 'its defaults'}: {said}") from error

    def make(self, subject: EvaluatedModel) -> None:
        subject.draw(self.wanted)

    def score(self, subject: EvaluatedModel) -> Scores:
        values, remaining = [], iter(self.prompts)
        for images in batched(subject.paths(self.wanted), self.metric):
            values += self.reward(images, list(islice(remaining, len(images))))
        scored = [100 * value for value in values if value is not None]
        if len(scored) < (1 - self.config.max_bad_fraction) * len(values):
            raise ValueError(f"{subject.name}: only {len(scored)} of {len(values)} images have a {self.metric}")
        mean, error = mean_and_error(scored)
        counts = {"images": len(scored), "unscored": len(values) - len(scored), "bad_prompts": self.bad}
        return Scores({self.metric: mean}, {self.metric: error}, counts)


def clip_score(config: EvaluateConfig) -> Rewarded:
    """A hundred times the cosine, by the CLIP model ``weights``."""
    return Rewarded(config, "clip_score", "CLIP score", "rewards.clip:ClipScore", {"model": config.weights})


def hps(config: EvaluateConfig) -> Rewarded:
    """A hundred times HPSv2, by the published checkpoint ``weights``."""
    options = {"weights": config.weights, "base": config.base}
    return Rewarded(config, "hps", "HPSv2", "rewards.hps:HPSv2", options)
