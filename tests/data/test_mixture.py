from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vargpt_rl.data.mixture import Mixture, MixtureSource, pack


class Endless:
    """Counts up to ``length``, over and over, as names."""

    def __init__(self, name: str, length: int):
        self.name, self.length = name, length

    def __iter__(self):
        return Counting(self)


class Counting:
    def __init__(self, source: Endless):
        self.source, self.at = source, 0

    def __iter__(self):
        return self

    def __next__(self) -> str:
        self.at += 1
        return f"{self.source.name}{(self.at - 1) % self.source.length}"

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def mixture(**settings) -> Mixture:
    sources = {
        "big": MixtureSource(Endless("g", 10_000), "generation", 3.0),
        "small": MixtureSource(Endless("s", 2), "generation", 1.0),
        "asked": MixtureSource(Endless("u", 7), "understanding"),
    }
    return Mixture(sources, **dict(batch=8, drawing_share=0.75, seed=0) | settings)


def kinds(batches) -> list[str]:
    return ["".join(sample[0] for sample in batch) for batch in batches]


def test_each_batch_holds_its_share_whatever_the_lengths():
    for share, drawings in ((0.75, 6), (0.5, 4), (0.2, 2)):
        for batch in islice(mixture(drawing_share=share), 200):
            modalities = "".join("u" if sample[0] == "u" else "g" for sample in batch)
            assert modalities == "g" * drawings + "u" * (8 - drawings)


def test_sources_of_a_modality_are_drawn_by_weight():
    found = Counter("".join(kinds(islice(mixture(), 1000))))
    assert found["u"] == 2000 and 0.72 < found["g"] / (found["g"] + found["s"]) < 0.78


def test_every_sample_of_a_source_comes_in_its_order():
    asked = [sample for batch in islice(mixture(), 14) for sample in batch if sample[0] == "u"]
    assert asked == [f"u{number % 7}" for number in range(28)]


def test_the_same_seed_gives_the_same_and_ranks_differ():
    first = kinds(islice(mixture(seed=1), 50))
    assert first == kinds(islice(mixture(seed=1), 50))
    assert first != kinds(islice(mixture(seed=2), 50))
    assert first != kinds(islice(mixture(seed=1, rank=1), 50))


@pytest.mark.parametrize("taken", [0, 1, 17])
def test_a_resumed_mixture_goes_on_where_it_was(taken):
    batches = iter(mixture())
    list(islice(batches, taken))
    state = batches.state_dict()
    resumed = iter(mixture())
    resumed.load_state_dict(state)
    assert list(islice(resumed, 30)) == list(islice(batches, 30))
    other = Mixture({"one": MixtureSource(Endless("g", 3), "generation")}, 2, 1.0, 0)
    with pytest.raises(ValueError, match="resumed with .'one'."):
        iter(other).load_state_dict(state)


def test_batches_are_made_with_a_generator_of_their_own():
    def made(samples: list[str], rng: np.random.Generator) -> tuple:
        return tuple(samples), float(rng.random())

    plain = list(islice(mixture(), 6))
    found = list(islice(mixture(make=made), 6))
    assert [list(samples) for samples, _ in found] == plain
    assert len({number for _, number in found}) == 6
    batches = iter(mixture(make=made))
    list(islice(batches, 3))
    resumed = iter(mixture(make=made))
    resumed.load_state_dict(batches.state_dict())
    assert list(islice(resumed, 3)) == found[3:]


def test_wrong_use_is_named():
    drawn, asked = (MixtureSource(Endless(kind[0], 5), kind) for kind in ("generation", "understanding"))
    with pytest.raises(ValueError, match="0.01 drawings gives 0 of each batch=8"):
        mixture(drawing_share=0.01)
    with pytest.raises(ValueError, match="2 understanding samples in each batch: no source"):
        Mixture({"drawn": drawn}, 4, 0.5, 0)
    with pytest.raises(ValueError, match="0 understanding samples in each batch: needless source"):
        Mixture({"drawn": drawn, "asked": asked}, 4, 1.0, 0)
    with pytest.raises(ValueError, match="unknown modality 'editing'"):
        MixtureSource([], "editing")
    with pytest.raises(ValueError, match="weight is 0"):
        MixtureSource([], "generation", 0)
    with pytest.raises(ValueError, match="source short came to an end"):
        list(Mixture({"short": MixtureSource([1, 2, 3], "generation")}, 2, 1.0, 0))


# Packing


def test_a_known_packing():
    assert pack([5, 3, 8, 2, 5, 1], 8) == [[2], [0, 1], [4, 3, 5]]
    assert pack([], 8) == []
    for lengths in ([9], [3, 0], [-1]):
        with pytest.raises(ValueError, match=f"text {len(lengths) - 1} has length {lengths[-1]}, expected 1 to 8"):
            pack(lengths, 8)


@given(st.lists(st.integers(1, 20), max_size=60))
def test_packs_hold_every_text_once_and_no_two_fit_together(lengths):
    rows = pack(lengths, 20)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    sizes = sorted(sum(lengths[index] for index in row) for row in rows)
    assert all(size <= 20 for size in sizes)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > 20
