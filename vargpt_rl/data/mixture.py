"""Batches drawn from several sources of records, and short texts packed into rows.

Each batch holds the same share of images to draw and of questions, whatever the lengths of the sources ("dynamic
batch balancing between modalities", VARGPT-v1.1, section 4.1), so that every rank has gradients for the same
parameters. Within a modality the sources are drawn by weight.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

MODALITIES = ("generation", "understanding")
_ENDED = object()


@dataclass(frozen=True)
class MixtureSource:
    """A source of a mixture. ``data`` gives endless iterators with ``state_dict`` and ``load_state_dict``.

    Edits count as "generation". ``weight`` is relative to the other sources of the same modality.
    """

    data: Iterable
    modality: str
    weight: float = 1.0

    def __post_init__(self):
        if self.modality not in MODALITIES:
            raise ValueError(f"unknown modality {self.modality!r}, expected one of {MODALITIES}")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight is {self.weight}, expected more than 0")


class Mixture(IterableDataset):
    """Endless batches: lists of ``batch`` samples, the drawings first. The same ``seed`` and ``rank`` give the same.

    With ``make``, what it makes of each list and of a generator that is the batch's own: a resumed mixture makes the
    same. Raises ValueError where ``drawing_share`` of ``batch`` rounds to none or all, or a modality lacks a source.
    """

    def __init__(
        self,
        ingredients: Mapping[str, MixtureSource],
        batch: int,
        drawing_share: float,
        seed: int,
        rank: int = 0,
        make: Callable[[list[Any], np.random.Generator], Any] | None = None,
    ):
        drawings = round(drawing_share * batch)
        if 0 < drawing_share < 1 and drawings in (0, batch):
            raise ValueError(f"a share of {drawing_share} drawings gives {drawings} of each batch={batch}")
        self.ingredients, self.seed, self.rank, self.make = dict(ingredients), seed, rank, make
        self.counts = dict(zip(MODALITIES, (drawings, batch - drawings), strict=True))
        for modality, count in self.counts.items():
            if bool(count) != any(ingredient.modality == modality for ingredient in self.ingredients.values()):
                raise ValueError(f"{count} {modality} samples in each batch: {'no' if count else 'needless'} source")

    def __iter__(self) -> "MixtureIterator":
        worker = get_worker_info()
        return MixtureIterator(self, (self.seed, self.rank, worker.id if worker else 0))


class MixtureIterator(Iterator):
    """The batches of a `Mixture`, with a state: how many there were, and the states of the sources."""

    def __init__(self, mixture: Mixture, seed: tuple[int, ...]):
        self._mixture, self._seed, self._batches = mixture, seed, 0
        self._sources = {name: iter(ingredient.data) for name, ingredient in mixture.ingredients.items()}

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
        """The names of the sources that a batch takes its ``count`` samples of ``modality`` from."""
        weights = {name: i.weight for name, i in self._mixture.ingredients.items() if i.modality == modality}
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


class Pack(NamedTuple):
    """Texts that share a row. Block i of the row, positions ``bounds[i]`` to ``bounds[i + 1]``, is text ``indices[i]``.

    What keeps the blocks apart, in positions and attention, is up to whoever makes the row.
    """

    indices: tuple[int, ...]
    bounds: tuple[int, ...]


def pack(lengths: Sequence[int], limit: int) -> list[Pack]:
    """Texts of these lengths as rows of at most ``limit``, each text in one row: the longest first, each into the
    fullest row that has room. Raises ValueError for a text that is longer than ``limit``, or empty.
    """
    for index, length in enumerate(lengths):
        if not 0 < length <= limit:
            raise ValueError(f"text {index} has length {length}, expected 1 to {limit}")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left in each row, with its number, in ascending order
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        at = bisect_left(room, (lengths[index], 0))
        left, row = room.pop(at) if at < len(room) else (limit, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(room, (left - lengths[index], row))
    return [Pack(tuple(row), (0, *accumulate(lengths[index] for index in row))) for row in rows]
