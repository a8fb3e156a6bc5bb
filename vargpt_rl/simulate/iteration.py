"""Simulate an iteration's pairs and DPO as discrete events: workers, learner ranks, and the driver that feeds them.

As in ``actors.pool``, the driver dispatches a batch to each idle worker and takes results, one at a time; while it
writes a part of the preference table, it does nothing else. As in ``learners.pairs``, DPO may run the share of its
steps that matches the share of finished parts. If processes share CPU cores, each computation holds one. Workers and
ranks that share GPUs (``placement=colocated``) are as many as GPUs, without overlap.
"""

from collections import Counter, defaultdict
from collections.abc import Generator
from dataclasses import dataclass
from math import ceil

try:
    import simpy
except ModuleNotFoundError as error:
    raise ValueError("the simulation needs the extra 'simulate': pip install 'vargpt-rl[simulate]'") from error

from vargpt_rl.simulate.costs import Costs


@dataclass(frozen=True)
class Work:
    """The work of an iteration."""

    prompts: int
    """Prompts, sampled once each."""
    steps: int
    """Steps of DPO."""
    pairs: int
    """Pairs per step."""
    sources: int = 2
    """Policies that share the prompts."""
    min_pairs: int | None = None
    """As ``dpo.min_pairs``."""


@dataclass(frozen=True)
class Machine:
    """The processes and the cores that they share."""

    workers: int
    ranks: int = 1
    cores: int | None = None
    """CPU cores that all processes share; None if each process has its own device, and the driver its own core."""


@dataclass(frozen=True)
class Forecast:
    """The predicted times of an iteration."""

    pairs_s: float
    """Seconds until the pairs are finished."""
    total_s: float
    """Seconds until DPO is finished."""
    busy: dict[str, float]
    """Busy seconds by activity: of the driver (``dispatch``, ``store``, ``table``), of all workers (``draw``,
    ``encode``, ``score``, ``swap``) and of the ranks (``train``)."""
    served: dict[str, int]
    """Batches by activity."""

    @property
    def driver(self) -> float:
        """Share of ``pairs_s`` in which the driver is busy."""
        return sum(self.busy[what] for what in ("dispatch", "store", "table")) / self.pairs_s


class _Simulation:
    def __init__(self, costs: Costs, work: Work, machine: Machine):
        self.costs = costs
        self.work = work
        self.machine = machine
        self.env = simpy.Environment()
        self.driver = simpy.Resource(self.env)
        self.cores = simpy.Resource(self.env, machine.cores) if machine.cores else None
        self.busy: dict[str, float] = defaultdict(float)
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
        """Occupy the driver, which does one thing at a time."""
        with self.driver.request() as turn:
            yield turn
            for what, spent in seconds.items():
                yield from self._compute(what, spent)

    def _worker(self, what: str, waiting: list[int], seconds: float, result: float) -> Generator:
        """Serve batches. A full one takes ``seconds`` and returns ``result`` bytes, a smaller one less."""
        while waiting:
            share = waiting.pop() / self.costs.batch
            yield from self._drive(dispatch=self.costs.dispatch_s / 2)
            yield from self._compute(what, seconds * share)
            yield from self._drive(dispatch=self.costs.dispatch_s / 2, store=self.costs.byte_s * result * share)
            self.served[what] += 1

    def _map(self, what: str, items: int, seconds: float, result: float, size: int | None = None) -> Generator:
        """Run ``RolloutPool.run`` in batches of ``size``, by default ``costs.batch``."""
        size = size or self.costs.batch
        waiting = [min(size, items - at) for at in range(0, items, size)]
        workers = min(self.machine.workers, len(waiting))
        yield self.env.all_of([self.env.process(self._worker(what, waiting, seconds, result)) for _ in range(workers)])

    def _swap(self) -> Generator:
        """Swap the weights of all workers at once."""
        seconds = self.costs.swap_s + self.costs.swap_byte_s * self.costs.weight_bytes
        workers = range(self.machine.workers)
        yield self.env.all_of([self.env.process(self._compute("swap", seconds)) for _ in workers])

    def _draw(self, items: int) -> Generator:
        costs = self.costs
        yield from self._map("draw", items, costs.draw_s, costs.result_bytes * costs.batch)

    def _pairs(self) -> Generator:
        """``vargpt_rl.driver.pairs``: every policy samples an equal share, the last one in rounds."""
        costs = self.costs
        prompts = self.work.prompts
        sources = self.work.sources
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
        pairs_s = self.env.now
        self.env.run(dpo)
        return Forecast(pairs_s, self.env.now, dict(self.busy), dict(self.served))


def simulate(costs: Costs, work: Work, machine: Machine) -> Forecast:
    """Predict an iteration's times. ValueError unless every count is 1 or more."""
    if min(work.prompts, work.steps, work.pairs, work.sources, machine.workers, machine.ranks) < 1:
        raise ValueError(f"{work} {machine}: expected 1 or more of each")
    return _Simulation(costs, work, machine).run()
