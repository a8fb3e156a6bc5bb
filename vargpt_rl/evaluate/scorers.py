"""CLIP score and HPSv2 on your own prompts, computed by the rewards of the same names.

Both are 100 x the cosine of image and prompt, as usual. ``prompts`` is a .txt or .jsonl file.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from PIL import Image

from vargpt_rl.common.bars import progress_bar
from vargpt_rl.common.errors import first_line
from vargpt_rl.common.plugins import make_plugin
from vargpt_rl.data.images import read_image
from vargpt_rl.data.sources import prompts_from_file
from vargpt_rl.evaluate.evaluated_model import EvaluatedModel, ImageRequest
from vargpt_rl.evaluate.report import Column, Scores, summarise
from vargpt_rl.evaluate.rows import quarantine_of
from vargpt_rl.evaluate.settings import EvaluateConfig
from vargpt_rl.inference.conversation import device_and_dtype

BATCH = 16  # images that are scored at once


def read_prompts(config: EvaluateConfig) -> tuple[list[str], int]:
    """Read the first ``limit`` prompts and count bad lines. ValueError for too many bad lines or no prompt."""
    assert config.prompts is not None  # `EvaluateConfig` requires it for this benchmark
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
    """Request one image of each prompt."""
    return [ImageRequest(f"images/{i:05d}.png", prompt, i) for i, prompt in enumerate(prompts)]


def batched(paths: list[Path], label: str) -> Iterator[list[Image.Image]]:
    """Load images in batches, with a progress bar."""
    remaining = iter(progress_bar(paths, name=label, unit="image"))
    while batch := list(islice(remaining, BATCH)):
        yield [read_image(path) for path in batch]


class Rewarded:
    """The benchmark: 100 x the mean of a reward. The reward is tested before any image is generated."""

    def __init__(self, config: EvaluateConfig, metric: str, heading: str, path: str, options: dict[str, str | None]):
        self.config = config
        self.metric = metric
        self.columns = [Column(metric, heading)]
        self.prompts, self.bad = read_prompts(config)
        self.requests = image_of_each(self.prompts)
        given = {key: value for key, value in options.items() if value is not None}
        device, _ = device_and_dtype(config.device, config.dtype)
        self.reward = make_plugin(path, {**given, "device": str(device)})
        if config.num_shards == 1:
            try:
                self.reward([Image.new("RGB", config.size)], self.prompts[:1])
            except (OSError, ValueError) as error:
                names = " ".join(f"{key}={value}" for key, value in given.items())
                raise ValueError(f"{path} does not work with {names or 'its defaults'}: {first_line(error)}") from error

    def make(self, model: EvaluatedModel) -> None:
        model.draw(self.requests)

    def score(self, model: EvaluatedModel) -> Scores:
        values, remaining = [], iter(self.prompts)
        for images in batched(model.paths(self.requests), self.metric):
            values += self.reward(images, list(islice(remaining, len(images))))
        scored = [100 * value for value in values if value is not None]
        if len(scored) < (1 - self.config.max_bad_fraction) * len(values):
            raise ValueError(f"{model.name}: only {len(scored)} of {len(values)} images have a {self.metric}")
        counts = {"images": len(scored), "unscored": len(values) - len(scored), "bad_prompts": self.bad}
        return Scores(*summarise({self.metric: scored}), counts)


def clip_score(config: EvaluateConfig) -> Rewarded:
    """CLIP score, by the CLIP model ``weights``."""
    return Rewarded(config, "clip_score", "CLIP score", "rewards.clip:ClipScore", {"model": config.weights})


def hps(config: EvaluateConfig) -> Rewarded:
    """HPSv2 x 100, by the published checkpoint ``weights``."""
    options = {"weights": config.weights, "base": config.base}
    return Rewarded(config, "hps", "HPSv2", "rewards.hps:HPSv2", options)
