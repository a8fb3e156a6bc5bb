"""What the parts of an iteration cost, measured (``vargpt_rl.simulate.measure``), as JSON."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from omegaconf import OmegaConf

from configs.schema import LoopConfig
from vargpt_rl.driver.run import CONFIG, SUMMARY


@dataclass(frozen=True)
class Costs:
    """Seconds. Of a worker or learner rank: for a batch of ``batch`` images drawn, encoded or scored, for one of
    ``micro_batch`` pairs trained on, and for a step beside its micro-batches. Of the driver: for a batch handed out and
    taken back, for a byte of its result, and for a pair written to the table. To swap in new weights: once, and for a
    byte.

    ``result_bytes`` of a drawn image and ``encoded_bytes`` of an encoded one come back from a worker,
    ``weight_bytes`` go to it.
    """

    batch: int
    micro_batch: int
    draw_s: float
    encode_s: float
    score_s: float
    micro_batch_s: float
    step_s: float
    dispatch_s: float
    byte_s: float
    pair_s: float
    swap_s: float
    swap_byte_s: float
    result_bytes: float
    encoded_bytes: float
    weight_bytes: float

    def __post_init__(self):
        for field in fields(self):
            value, least = getattr(self, field.name), 1 if field.type is int else 0
            if not isinstance(value, int | float) or not value >= least:
                raise ValueError(f"{field.name}={value!r}: expected a number of {least} or more")

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Costs":
        """ValueError, naming file and key, for a missing, unknown or bad one."""
        found = json.loads(path.read_text())
        names = {field.name for field in fields(cls)}
        if not isinstance(found, dict) or found.keys() != names:
            odd = sorted(names ^ set(found))
            raise ValueError(
                f"{path}: missing or unknown keys: {', '.join(odd)}; vargpt_rl.simulate.measure writes all"
            )
        try:
            return cls(**found)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def of_run(self, directory: Path) -> "Costs":
        """The same, with drawing, training and swapping as in the last iteration of a finished run.

        What its records do not tell apart is kept: the driver's costs, and how encoding and scoring compare to drawing.
        """
        path = directory / SUMMARY
        if not path.exists():
            raise ValueError(f"{directory}: no {SUMMARY}, expected the directory of a finished run")
        settings = OmegaConf.to_object(OmegaConf.merge(LoopConfig, OmegaConf.load(directory / CONFIG)))
        iterations = json.loads(path.read_text())["iterations"]
        if not iterations:
            raise ValueError(f"{path}: no iteration, expected a run with stage align")
        last = iterations[-1]
        there = settings.at_resolution(last["resolution"])
        drawn, dpo, swap, recipe = last["rollout"], last["dpo"], last["swap"], there.dpo.recipe
        draw_s = drawn["seconds"] * there.rollout.workers * there.rollout.batch_size / drawn["images"]
        return replace(
            self,
            batch=there.rollout.batch_size,
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
