"""A stage of a run whose workers are doubles, for tests of the driver's functions."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from actors.weights import SwapReport
from actors.worker import EncodedImage, Failure, ImageScore
from configs.load import load_config
from rewards.preferences import external_winner
from vargpt_rl.data.quarantine import Quarantine
from vargpt_rl.data.samples import Sample
from vargpt_rl.data.sources import ShapesConfig, ShapesSource
from vargpt_rl.driver.inputs import Inputs
from vargpt_rl.driver.run import Run
from vargpt_rl.driver.session import Session, StageContext
from vargpt_rl.driver.weights import WeightSync


class WorkersDouble:
    """Stands in for `RolloutPool`: images are their seeds, every image is equally likely, "bad" keys are unreadable.

    ``calls`` has the name and items of each call of ``run``.
    """

    def __init__(self):
        self.config: Any = None
        self.version = 0
        self.published: list[str] = []
        self.verified = True
        self.probed = [-10.0, -10.0]
        self.calls: list[tuple[str, list]] = []

    def run(self, method, items: list, *args, batch_size: int | None = None) -> list:
        self.calls.append((method.__name__, list(items)))
        return getattr(self, method.__name__)(items, *args)

    def publish(self, path: Path, version: int) -> SwapReport:
        self.version = version
        self.published.append(path.parent.name)
        return SwapReport(version, "", 8, 0.5, 0.0, 2, self.verified)

    def probe(self, prompt, bits, resolution) -> list[float]:
        return self.probed

    def generate_images(self, jobs, resolution, sampling, name) -> list[Sample]:
        return [Sample(p, seed.to_bytes(8), resolution, seed, {}, self.version, name, [-2.0]) for p, seed in jobs]

    def complete_images(self, jobs, scales, resolution, sampling, name) -> list[Sample]:
        return self.generate_images([(image.prompt, seed) for image, seed in jobs], resolution, sampling, name)

    def encode(self, keys, resolution) -> list[EncodedImage | Failure]:
        features = np.zeros((4, 2, 2), np.float16)
        return [Failure(key, "broken") if key == "bad" else EncodedImage(key, b"\xff", features) for key in keys]

    def find_unreadable(self, keys, side) -> list[Failure | None]:
        return [Failure(key, f"unreadable at {side}") if key == "bad" else None for key in keys]

    def check(self, items, resolution, check) -> list:
        return check([Image.new("RGB", (64, 64), "white")] * len(items), [prompt for prompt, _ in items])

    def score(self, items, resolution, tau=1.0, states=None) -> list[ImageScore]:
        return [ImageScore(-1.0, [-1.0], [0.5])] * len(items)

    def reply(self, texts, max_new_tokens) -> list[str | None]:
        """Answer every second text."""
        return [f"Here: {text}" if at % 2 == 0 else None for at, text in enumerate(texts)]


def stage_context(
    folder: Path, *overrides: str, pool: Any = None, text: Any = None, source: Any = None, **inputs: Any
) -> StageContext:
    """Return iteration 0 of a new run in ``folder``, with settings over those of a small loop at 32 px."""
    small = ["resolutions=[32]", "iterations=1", "evaluation.diversity=0", "align.methods=[dpo]", "reward.path=null"]
    config = load_config([f"runs={folder}", "name=run", *small, *overrides])
    run = Run(folder / "run", {})
    pool = pool or WorkersDouble()
    given = Inputs(
        **{
            "model": "",
            "source": source or ShapesSource(ShapesConfig()),
            "quarantine": Quarantine(folder / "quarantine.jsonl"),
            "builder": external_winner,
            "reward": None,
            "judge": None,
            "prompts": None,
            "max_bad_fraction": 0.5,
            "stream": None,
        }
        | inputs
    )
    session = Session(
        config=config,
        inputs=given,
        run=run,
        pool=pool,
        text=text,
        weights=WeightSync(pool, text, run),
        learners=None,
    )
    return session.iteration(0)
