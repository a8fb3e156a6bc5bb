"""Batches mixed from several sources of records, and packing of short texts into rows.

Each batch has the same share of images to draw and of questions, whatever the lengths of the sources ("dynamic batch
balancing between modalities", VARGPT-v1.1, section 4.1), so every rank has gradients for the same parameters. Within a
modality, sources are sampled by weight.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

MODALITIES = ("generation", "understanding")
_ENDED = object()


class StatefulIterator(Protocol):
    """An iterator that can be resumed."""

    def __next__(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class StatefulSamples(Protocol):
    """Samples without end, read from the start by each iterator."""

    def __iter__(self) -> StatefulIterator: ...


@dataclass(frozen=True)
class MixtureSource:
    """A source of a mixture.

    Edits count as "generation". ``weight`` is relative to the other sources of the same modality.
    """

    data: StatefulSamples
    modality: str
    weight: float = 1.0

    def __post_init__(self):
        if self.modality not in MODALITIES:
            raise ValueError(f"unknown modality {self.modality!r}, expected one of {MODALITIES}")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight is {self.weight}, expected more than 0")


class Mixture(IterableDataset):
    """Endless batches: lists of ``batch`` samples, images to draw first. ``seed`` and ``rank`` determine them.

    ``make`` turns each list into a batch, with a random generator of the batch's own, so a resumed mixture makes the
    same batches. Raises ValueError if ``drawing_share`` of ``batch`` rounds to none or all, or a modality lacks a
    source.
    """

    def __init__(
        self,
        sources: Mapping[str, MixtureSource],
        batch: int,
        drawing_share: float,
        seed: int,
        rank: int = 0,
        make: Callable[[list[Any], np.random.Generator], Any] | None = None,
    ):
        drawings = round(drawing_share * batch)
        if 0 < drawing_share < 1 and drawings in (0, batch):
            raise ValueError(f"a share of {drawing_share} drawings gives {drawings} of each batch={batch}")
        self.sources = dict(sources)
        self.seed = seed
        self.rank = rank
        self.make = make
        self.counts = dict(zip(MODALITIES, (drawings, batch - drawings), strict=True))
        for modality, count in self.counts.items():
            if bool(count) != any(source.modality == modality for source in self.sources.values()):
                raise ValueError(f"{count} {modality} samples in each batch: {'no' if count else 'needless'} source")

    def __iter__(self) -> "MixtureIterator":
        worker = get_worker_info()
        return MixtureIterator(self, (self.seed, self.rank, worker.id if worker else 0))


class MixtureIterator(Iterator):
    """The batches of a `Mixture`. Its state is the number of batches so far and the states of the sources."""

    def __init__(self, mixture: Mixture, seed: tuple[int, ...]):
        self._mixture = mixture
        self._seed = seed
        self._batches = 0
        self._sources = {name: iter(source.data) for name, source in mixture.sources.items()}

    def __next__(self) -> Any:
        rng = np.random.default_rng([*self._seed, self._batches])
        self._batches += 1
        samples = [
            self._sample(name)
            for modality, count in self._mixture.counts.items()
            if count
            for name in self._drawn(modality, count, rng)
        ]
        return self._mixture.make(samples, rng) if self._mixture.make else samples

    def _drawn(self, modality: str, count: int, rng: np.random.Generator) -> list[str]:
        """Sample the sources that a batch takes its ``count`` samples of ``modality`` from."""
        sources = self._mixture.sources.items()
        weights = {name: source.weight for name, source in sources if source.modality == modality}
        shares = np.array(list(weights.values())) / sum(weights.values())
        return rng.choice(list(weights), size=count, p=shares).tolist()

    def _sample(self, name: str) -> Any:
        sample = next(self._sources[name], _ENDED)
        if sample is _ENDED:
            raise ValueError(f"source {name} came to an end, but a mixture is endless")
        return sample

    def state_dict(self) -> dict[str, Any]:
        return {
            "batches": self._batches,
            "sources": {name: source.state_dict() for name, source in self._sources.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for the state of other sources."""
        if state["sources"].keys() != self._sources.keys():
            raise ValueError(f"saved with the sources {sorted(state['sources'])}, resumed with {sorted(self._sources)}")
        self._batches = state["batches"]
        for name, source in self._sources.items():
            source.load_state_dict(state["sources"][name])


def pack(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Pack texts of these lengths into rows of at most ``limit``: longest first, each into the fullest row with room.

    Return the indices of the texts of each row, in order. The collator keeps the texts of a row apart.

    Raises ValueError for a text that is longer than ``limit``, or empty.
    """
    for index, length in enumerate(lengths):
        if not 0 < length <= limit:
            raise ValueError(f"text {index} has length {length}, expected 1 to {limit}")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # room left in each row, with the row's number, ascending
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        at = bisect_left(room, (lengths[index], 0))
        left, row = room.pop(at) if at < len(room) else (limit, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(room, (left - lengths[index], row))
    return rows
