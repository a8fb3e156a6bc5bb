"""Costs of an iteration's parts, stored as JSON: measured by ``vargpt_rl.simulate.measure``, or put together by hand.

``h200_256px.json`` and ``h200_512px.json`` hold those of the released model's size on one NVIDIA H200. Their
``sources`` say where each number comes from.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from omegaconf import OmegaConf

from configs.schema import LoopConfig
from vargpt_rl.driver.run import SUMMARY
from vargpt_rl.page.contents import CONFIG

SOURCES = "sources"
"""Optional key of a file: where its numbers come from, for the reader."""


@dataclass(frozen=True)
class Costs:
    """Costs of workers, learner ranks and the driver, in seconds and bytes."""

    batch: int
    """Images of a worker's batch."""
    micro_batch: int
    """Pairs of a rank's micro-batch."""
    draw_s: float
    """Worker: to sample a batch."""
    encode_s: float
    """Worker: to encode a batch."""
    score_s: float
    """Worker: to score a batch."""
    micro_batch_s: float
    """Rank: to train on a micro-batch."""
    step_s: float
    """Rank: for a step, besides its micro-batches."""
    dispatch_s: float
    """Driver: to dispatch a batch and take its result."""
    byte_s: float
    """Driver: per byte of a result."""
    pair_s: float
    """Driver: for a prompt's part of the records, its pair and the pair's row, besides dispatching."""
    swap_s: float
    """Worker: to swap weights, besides their bytes."""
    swap_byte_s: float
    """Worker: per byte of swapped weights."""
    result_bytes: float
    """Result of a sampled image."""
    encoded_bytes: float
    """Result of an encoded image."""
    weight_bytes: float
    """Weights sent to a worker."""

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            least = 1 if field.type is int else 0
            if not isinstance(value, int | float) or not value >= least:
                raise ValueError(f"{field.name}={value!r}: expected a number of {least} or more")

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Costs":
        """Read a file. ValueError, naming file and key, for a missing, unknown or bad key."""
        found = json.loads(path.read_text())
        names = {field.name for field in fields(cls)}
        if not isinstance(found, dict) or found.keys() - {SOURCES} != names:
            odd = sorted(names ^ (set(found) - {SOURCES}))
            raise ValueError(
                f"{path}: missing or unknown keys {', '.join(odd)}: expected a file of vargpt_rl.simulate.measure"
            )
        try:
            return cls(**{name: found[name] for name in names})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def of_run(self, directory: Path) -> "Costs":
        """Replace the costs of sampling, training and swapping by those of a finished run's last iteration.

        Costs that its records do not separate stay: the driver's, and the ratios of encoding and scoring to sampling.
        """
        path = directory / SUMMARY
        if not path.exists():
            raise ValueError(f"{directory}: no {SUMMARY}, expected the directory of a finished run")
        settings = OmegaConf.to_object(OmegaConf.merge(LoopConfig, OmegaConf.load(directory / CONFIG)))
        iterations = json.loads(path.read_text())["iterations"]
        if not iterations:
            raise ValueError(f"{path}: expected a run with stage align, got no iteration")
        last = iterations[-1]
        there = settings.at_resolution(last["resolution"])
        if not last.get("rollout"):
            raise ValueError(f"{path}: expected a last iteration that sampled pairs and trained DPO on them")
        drawn, dpo, swap, recipe = last["rollout"], last["dpo"], last["swap"], there.dpo.recipe
        batch = drawn.get("batch_size", there.rollout.images_at_once)  # runs of older versions did not record it
        draw_s = drawn["seconds"] * there.rollout.workers * batch / drawn["images"]
        return replace(
            self,
            batch=batch,
            micro_batch=recipe.micro_batch,
            draw_s=draw_s,
            encode_s=self.encode_s * draw_s / self.draw_s,
            score_s=self.score_s * draw_s / self.draw_s,
            micro_batch_s=(dpo["seconds"] - dpo["waited"]) / dpo["steps"] / recipe.accumulation(there.learner.ranks),
            step_s=0.0,
            swap_s=0.0,
            swap_byte_s=swap["seconds"] / swap["bytes"],
            weight_bytes=swap["bytes"],
        )
