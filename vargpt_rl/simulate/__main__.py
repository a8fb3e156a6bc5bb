"""Predict an iteration's time: ``python -m vargpt_rl.simulate costs=FILE [run=DIR gpus=[8,64,512] prompts=... ...]``.

``costs`` is written by ``python -m vargpt_rl.simulate.measure``; a finished run's directory, in ``run``, gives the
costs of its own model and GPUs in the place of those of the embedded one. Printed are, for each number of GPUs, the
time until the pairs are there and until DPO is done, what share of it the workers, the ranks and the driver are busy,
and which of them is busiest: where that is the driver, more GPUs do not help.

Not in it: SFT and evaluation, failures, shared disks and networks that are full, the cost of reducing gradients over
more ranks, and rewards.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from vargpt_rl.common.command import run_command
from vargpt_rl.common.console import wide_console
from vargpt_rl.simulate.costs import Costs
from vargpt_rl.simulate.iteration import Forecast, Machine, Work, simulate


@dataclass
class SimulateSettings:
    """The paper's iteration at 256 px, unless told otherwise. ``draw_share`` of the GPUs draw, the others train;
    ``sources``: so many SFT checkpoints draw; ``min_pairs`` as ``dpo.min_pairs``, null for no overlap.
    """

    costs: str = "costs.json"
    run: str | None = None
    gpus: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128, 256, 512, 1024])
    draw_share: float = 0.5
    prompts: int = 180_000
    sources: int = 2
    steps: int = 5000
    pairs: int = 384
    min_pairs: int | None = None

    def __post_init__(self):
        if not self.gpus or min(self.gpus) < 2:
            raise ValueError(f"gpus={self.gpus}: expected 2 or more each")
        if not 0 < self.draw_share < 1:
            raise ValueError(f"draw_share={self.draw_share}: expected a share above 0 and below 1")
        if self.min_pairs is not None and self.min_pairs < 1:
            raise ValueError(f"min_pairs={self.min_pairs}: expected 1 or more, or null")


def split(gpus: int, share: float) -> Machine:
    """At least one worker and one rank."""
    workers = min(gpus - 1, max(1, round(gpus * share)))
    return Machine(workers, gpus - workers)


def shares(found: Forecast, machine: Machine) -> dict[str, float]:
    """How much of the whole time each kind of process is busy."""
    busy, total = found.busy, found.total_s
    drawn = sum(busy.get(what, 0.0) for what in ("draw", "encode", "score", "swap"))
    driven = {what: busy.get(what, 0.0) / total for what in ("dispatch", "store", "table")}
    return {"workers": drawn / machine.workers / total, "ranks": busy["train"] / total, **driven}


def run(settings: SimulateSettings) -> None:
    """Print a row a number of GPUs."""
    costs = Costs.read(Path(settings.costs))
    if settings.run:
        costs = costs.of_run(Path(settings.run))
    work = Work(settings.prompts, settings.steps, settings.pairs, settings.sources, settings.min_pairs)
    table = Table(title="an iteration's pairs and DPO", title_justify="left", box=SIMPLE_HEAD)
    columns = (
        "GPUs",
        "workers",
        "ranks",
        "pairs s",
        "all s",
        "workers",
        "ranks",
        "dispatch",
        "store",
        "table",
        "busiest",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for gpus in settings.gpus:
        machine = split(gpus, settings.draw_share)
        found = simulate(costs, work, machine)
        busy = shares(found, machine)
        kinds = {"workers": busy["workers"], "ranks": busy["ranks"]}
        kinds["driver"] = busy["dispatch"] + busy["store"] + busy["table"]
        figures = f"{found.pairs_s:.0f}", f"{found.total_s:.0f}", *(f"{share:.1%}" for share in busy.values())
        table.add_row(str(gpus), str(machine.workers), str(machine.ranks), *figures, max(kinds, key=kinds.get))
    wide_console().print(table)


if __name__ == "__main__":
    sys.exit(run_command(SimulateSettings, run))
