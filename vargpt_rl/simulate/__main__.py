"""Predict an iteration's time: ``python -m vargpt_rl.simulate costs=FILE [run=DIR gpus=[8,64,512] prompts=... ...]``.

``costs`` is a file of ``python -m vargpt_rl.simulate.measure``, or one of this package (``h200_256px.json``). With
``run``, a finished run's directory, the costs of its model and GPUs replace those of the file. For each number of GPUs,
the table has the time until the pairs and until DPO are finished, the share of it in which the workers, the ranks and
the driver are busy, and which of them is busiest: if it is the driver, more GPUs do not help.

Not included: SFT, DPO's control, evaluation, failures, saturated disks and networks, reducing gradients over ranks,
and rewards.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from vargpt_rl.bench.harness import results_table
from vargpt_rl.common.command import run_command
from vargpt_rl.common.console import print_table
from vargpt_rl.common.settings import Between, Count, OneOf, at_least
from vargpt_rl.simulate.costs import Costs
from vargpt_rl.simulate.iteration import Forecast, Machine, Work, simulate


@dataclass
class SimulateSettings:
    """The iteration to predict, by default the paper's at 256 px."""

    costs: str = "costs.json"
    """File of measured costs."""
    run: str | None = None
    """Directory of a finished run, whose costs replace the measured ones."""
    gpus: list[Annotated[int, at_least(2)]] = field(default_factory=lambda: [8, 16, 32, 64, 128, 256, 512, 1024])
    """Numbers of GPUs to predict for."""
    placement: Annotated[str, OneOf("split", "colocated")] = "split"
    """As ``placement.kind``: separate GPUs for workers and ranks, or both on each GPU, in turns."""
    draw_share: Annotated[float, Between(0, 1, includes_low=False, includes_high=False)] = 0.5
    """Share of the GPUs that sample with ``placement=split``; the others train."""
    prompts: Count = 180_000
    sources: Count = 2
    """Number of SFT checkpoints that sample."""
    steps: Count = 5000
    """Steps of DPO."""
    pairs: Count = 384
    """Pairs per step of DPO."""
    min_pairs: Count | None = None
    """As ``dpo.min_pairs``; null for no overlap."""

    def __post_init__(self):
        if not self.gpus:
            raise ValueError("gpus=[]: expected one or more")
        if self.placement == "colocated" and self.min_pairs:
            raise ValueError(
                f"min_pairs={self.min_pairs}: expected null with placement=colocated, whose GPUs train or sample"
            )


def place(gpus: int, settings: SimulateSettings) -> Machine:
    """Place workers and ranks: one of each on every GPU if colocated, else on GPUs of their own."""
    if settings.placement == "colocated":
        return Machine(gpus, gpus)
    workers = min(gpus - 1, max(1, round(gpus * settings.draw_share)))
    return Machine(workers, gpus - workers)


def shares(found: Forecast, machine: Machine) -> dict[str, float]:
    """Return the share of the total time in which each kind of process is busy."""
    busy = found.busy
    total = found.total_s
    drawn = sum(busy.get(what, 0.0) for what in ("draw", "encode", "score", "swap"))
    driven = {what: busy.get(what, 0.0) / total for what in ("dispatch", "store", "table")}
    return {"workers": drawn / machine.workers / total, "ranks": busy["train"] / total, **driven}


def run(settings: SimulateSettings) -> None:
    """Print a row per number of GPUs."""
    costs = Costs.read(Path(settings.costs))
    if settings.run:
        costs = costs.of_run(Path(settings.run))
    work = Work(settings.prompts, settings.steps, settings.pairs, settings.sources, settings.min_pairs)
    columns = (
        "GPUs",
        "workers",
        "ranks",
        "pairs, s",
        "total, s",
        "workers",
        "ranks",
        "dispatch",
        "store",
        "table",
        "busiest",
    )
    table = results_table("an iteration's pairs and DPO", columns)
    for gpus in settings.gpus:
        machine = place(gpus, settings)
        found = simulate(costs, work, machine)
        busy = shares(found, machine)
        kinds = {"workers": busy["workers"], "ranks": busy["ranks"]}
        kinds["driver"] = busy["dispatch"] + busy["store"] + busy["table"]
        figures = f"{found.pairs_s:.0f}", f"{found.total_s:.0f}", *(f"{share:.1%}" for share in busy.values())
        table.add_row(str(gpus), str(machine.workers), str(machine.ranks), *figures, max(kinds, key=kinds.__getitem__))
    print_table(table)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(SimulateSettings, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
