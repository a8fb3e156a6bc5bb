"""An iteration's pairs and DPO as discrete events: workers, learner ranks, and the driver that feeds them.

As in ``actors.pool``, the driver hands a batch to each idle worker, and takes results back, one thing at a time; while
it writes a part of the preference table it does nothing else. As in ``learners.pairs``, DPO may take as large a share
of its steps as there is of the parts. Where processes share CPU cores, whatever computes holds one.
"""

from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass
from math import ceil

import simpy

from vargpt_rl.simulate.costs import Costs


@dataclass(frozen=True)
class Work:
    """An iteration: ``prompts`` are drawn once each, by ``sources`` policies; DPO takes ``steps`` steps of ``pairs``.

    ``min_pairs`` as ``dpo.min_pairs``.
    """

    prompts: int
    steps: int
    pairs: int
    sources: int = 2
    min_pairs: int | None = None


@dataclass(frozen=True)
class Machine:
    """``cores``: what all processes share; None where each has a device of its own, and the driver a core."""

    workers: int
    ranks: int = 1
    cores: int | None = None


@dataclass(frozen=True)
class Forecast:
    """Seconds until the pairs are there and until DPO is done; ``busy`` seconds of the driver by what for, and of all
    workers (``draw``, ``encode``, ``score``, ``swap``) and the ranks (``train``); ``served`` batches.
    """

    pairs_s: float
    total_s: float
    busy: dict[str, float]
    served: dict[str, int]

    @property
    def driver(self) -> float:
        """Share of the time of making pairs in which the driver worked."""
        return sum(self.busy[what] for what in ("dispatch", "store", "table")) / self.pairs_s


class _Simulation:
    def __init__(self, costs: Costs, work: Work, machine: Machine):
        self.costs, self.work, self.machine = costs, work, machine
        self.env = simpy.Environment()
        self.driver = simpy.Resource(self.env)
        self.cores = simpy.Resource(self.env, machine.cores) if machine.cores else None
        self.busy: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self.rounds = max(1, ceil(work.prompts / (work.min_pairs or work.prompts)))
        self.parts = [self.env.event() for _ in range(self.rounds)]

    def _compute(self, what: str, seconds: float) -> Generator:
        self.busy[what] += seconds
        if self.cores is None:
            yield self.env.timeout(seconds)
            return
        with self.cores.request() as core:
            yield core
            yield self.env.timeout(seconds)

    def _drive(self, **seconds: float) -> Generator:
        """The driver's work, one thing at a time."""
        with self.driver.request() as turn:
            yield turn
            for what, spent in seconds.items():
                yield from self._compute(what, spent)

    def _worker(self, what: str, waiting: list[int], seconds: float, result: float) -> Generator:
        """``seconds`` and ``result`` bytes of a full batch; a smaller one takes as much less."""
        while waiting:
            share = waiting.pop() / self.costs.batch
            yield from self._drive(dispatch=self.costs.dispatch_s / 2)
            yield from self._compute(what, seconds * share)
            yield from self._drive(dispatch=self.costs.dispatch_s / 2, store=self.costs.byte_s * result * share)
            self.served[what] += 1

    def _map(self, what: str, items: int, seconds: float, result: float, size: int | None = None) -> Generator:
        """``RolloutPool.run``, in batches of ``size``, or the usual one."""
        size = size or self.costs.batch
        waiting = [min(size, items - at) for at in range(0, items, size)]
        crew = min(self.machine.workers, len(waiting))
        yield self.env.all_of([self.env.process(self._worker(what, waiting, seconds, result)) for _ in range(crew)])

    def _swap(self) -> Generator:
        """New weights for all workers at once."""
        seconds = self.costs.swap_s + self.costs.swap_byte_s * self.costs.weight_bytes
        crew = range(self.machine.workers)
        yield self.env.all_of([self.env.process(self._compute("swap", seconds)) for _ in crew])

    def _draw(self, items: int) -> Generator:
        costs = self.costs
        yield from self._map("draw", items, costs.draw_s, costs.result_bytes * costs.batch)

    def _pairs(self) -> Generator:
        """``vargpt_rl.driver.losers``: every policy draws an equal share, the last one by rounds."""
        costs, prompts, sources = self.costs, self.work.prompts, self.work.sources
        shares = [len(range(source, prompts, sources)) for source in range(sources)]
        for share in shares[:-1]:
            yield from self._swap()
            yield from self._draw(share)
        yield from self._swap()
        for number, part in enumerate(self.parts):
            yield from self._draw(len(range(number, shares[-1], self.rounds)))
            pairs = len(range(number, prompts, self.rounds))
            yield from self._map("encode", pairs, costs.encode_s, costs.encoded_bytes * costs.batch)
            yield from self._map("score", 2 * pairs, costs.score_s, 0.0, 2 * costs.micro_batch)
            yield from self._drive(table=costs.pair_s * pairs)
            part.succeed()

    def _dpo(self) -> Generator:
        costs, work = self.costs, self.work
        if work.min_pairs is None:
            yield self.parts[-1]
        micro_batches = ceil(work.pairs / (costs.micro_batch * self.machine.ranks))
        for step in range(1, work.steps + 1):
            yield self.env.all_of(self.parts[: ceil(step * self.rounds / work.steps)])
            yield from self._compute("train", micro_batches * costs.micro_batch_s + costs.step_s)
            self.served["train"] += 1

    def run(self) -> Forecast:
        pairs, dpo = self.env.process(self._pairs()), self.env.process(self._dpo())
        self.env.run(pairs)
        made = self.env.now
        self.env.run(dpo)
        return Forecast(made, self.env.now, dict(self.busy), dict(self.served))


def simulate(costs: Costs, work: Work, machine: Machine) -> Forecast:
    """What an iteration takes. ValueError unless there is something to do and someone to do it."""
    if min(work.prompts, work.steps, work.pairs, work.sources, machine.workers, machine.ranks) < 1:
        raise ValueError(f"{work} {machine}: expected 1 or more of each")
    return _Simulation(costs, work, machine).run()
