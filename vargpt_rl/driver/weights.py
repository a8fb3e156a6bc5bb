"""Weight sync: load a policy into the rollout workers, and verify that they hold it."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from actors.pool import RolloutPool
from actors.weights import SwapReport
from vargpt_rl.data.samples import Probe
from vargpt_rl.driver.run import Run
from vargpt_rl.model.likelihood import log_prob_tolerance
from vargpt_rl.storage.checkpoint import WEIGHTS, Policy, recorded_hashes

Log = Callable[[str, int, dict], None]
"""Takes the stage's name, the step and its metrics."""


def _owners(weights: Sequence[Path]) -> dict[str, Path]:
    """Return the weight set that each tensor comes from: the last that has it. ValueError for an incomplete set.

    Only markers are read. Damaged weights are found by the workers, which hash what they have loaded.
    """
    owners: dict[str, Path] = {}
    for directory in weights:
        owners |= dict.fromkeys(recorded_hashes(directory / WEIGHTS), directory)
    return owners


class WeightSync:
    """Keeps the rollout workers, and the text engine if there is one, at the policy that is asked for.

    ``owners`` maps each tensor in the workers to the weight set that it comes from.
    """

    def __init__(self, pool: RolloutPool, text: RolloutPool | None, run: Run):
        self.pool = pool
        self.text = text
        self.run = run
        self.owners: dict[str, Path] = {}

    def swap_to(self, policy: Policy, log: Log) -> dict:
        """Load ``policy`` into all workers; return version, bytes, seconds. Only tensors that differ are sent.

        After a resume, workers first get the weights that the last ones held, under the same versions: a step then
        has the same versions whether or not the run was interrupted before it.
        """
        version = self.run.served["version"]
        held = [Path(os.path.normpath(self.run.directory / path)) for path in self.run.served["weights"]]
        if held and not self.owners:
            self._swap(held, version - len(set(_owners(held).values())), log)
        return self._swap(policy.weights, self.run.served["version"], log)

    def _swap(self, weights: Sequence[Path], version: int, log: Log) -> dict:
        """Publish the weight sets that differ, under versions after ``version`` and after the pool's."""
        wanted = _owners(weights)
        if stale := self.owners.keys() - wanted.keys():
            raise RuntimeError(f"workers hold {len(stale)} tensors that {weights} do not set, among them {min(stale)}")
        swap = {"version": version, "bytes": 0, "seconds": 0.0, "verified": True}
        held = dict(self.owners)
        for directory in weights:
            if any(held.get(name) != directory for name, owner in wanted.items() if owner == directory):
                held |= _owners([directory])
                version = max(version, self.pool.version) + 1
                report = _publish(self.pool, directory / WEIGHTS, version, "swap", log)
                if self.text:
                    _publish(self.text, directory / WEIGHTS, version, "swap/text", log)
                swap = {
                    "version": report.version,
                    "bytes": swap["bytes"] + report.bytes,
                    "seconds": swap["seconds"] + report.seconds,
                    "verified": True,
                }
        self.owners = wanted
        self.run.served = {
            "version": version,
            "weights": [os.path.relpath(directory, self.run.directory) for directory in weights],
        }
        return swap


def _publish(pool: RolloutPool, path: Path, version: int, stage: str, log: Log) -> SwapReport:
    report = pool.publish(path, version)
    if not report.verified:
        raise RuntimeError(f"{path}: workers report other weights than version {version}")
    log(stage, version, {key: value for key, value in asdict(report).items() if key != "checksum"})
    return report


def verify_swap(pool: RolloutPool, probe: Probe, learner: float, dtype: torch.dtype) -> float:
    """Return the largest difference, in nats, between the learner's and the workers' score of the probe.

    RuntimeError if rounding in ``dtype`` does not explain it: the workers do not hold the weights that were trained.
    """
    workers = pool.probe(probe.prompt, probe.bits, probe.resolution)
    worst = max(abs(value - learner) for value in workers)
    if not worst <= log_prob_tolerance(dtype, 8 * len(probe.bits)):
        raise RuntimeError(f"after the swap workers score the probe {workers}, the learner {learner}")
    return worst
