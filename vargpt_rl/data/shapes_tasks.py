"""Questions about scenes of the shapes world with their answers, and edit instructions with the edited scenes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vargpt_rl.data.shapes import (
    COLOURS,
    MARGIN,
    MIRRORED,
    NUMBERS,
    PLURALS,
    SHAPES,
    Scene,
    Thing,
    offset,
    separate,
    stands,
)

MOST_THINGS = 4
ADDED_DIAMETER = (0.22, 0.28)
PLACES_TO_ADD = (0.16, 0.5, 0.84)  # on both axes; a thing is added at the freest of the nine places
NEAR = 0.1  # places whose distances to what is there are as close as this are equally free
LEAST_DIAMETER = 0.2
RESIZE = {"larger": 1.4, "smaller": 0.7}
ASKED_RELATION_LEAST = 0.15  # displacement that makes a relation plain to see


def question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Make a question about an image of `scene` that has one right answer, and that one-word answer."""
    return _first_possible((_ask_colour, _ask_shape, _ask_number, _ask_presence, _ask_relation), scene, rng)


def edit(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
    """Make an instruction and the edited `scene`; the things it does not name are unchanged.

    The edited scene has an empty caption, since the grammar of captions does not cover every outcome.
    """
    instruction, things = _first_possible((_recolour, _reshape, _resize, _remove, _add), scene, rng)
    return instruction, replace(scene, caption="", things=things)


def _first_possible(kinds: Sequence, scene: Scene, rng: np.random.Generator) -> tuple:
    """Return the result of the first of the shuffled `kinds` that suits the scene; the others return None."""
    results = (kinds[index](scene, rng) for index in rng.permutation(len(kinds)))
    return next(result for result in results if result is not None)


def _pick(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def _only_once(values: Sequence[str]) -> list[str]:
    return [value for value, count in Counter(values).items() if count == 1]


def _ask_colour(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    shapes = _only_once([thing.shape for thing in scene.things])
    if not shapes:
        return None
    shape = _pick(shapes, rng)
    return f"what colour is the {shape}?", next(thing.colour for thing in scene.things if thing.shape == shape)


def _ask_shape(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    colours = _only_once([thing.colour for thing in scene.things])
    if not colours:
        return None
    colour = _pick(colours, rng)
    return f"what shape is the {colour} thing?", next(thing.shape for thing in scene.things if thing.colour == colour)


def _ask_number(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    return "how many things are there?", NUMBERS[len(scene.things)]


def _ask_presence(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    present = [(thing.colour, thing.shape) for thing in scene.things]
    if rng.random() < 0.5:
        colour, shape = present[rng.integers(len(present))]
        return f"is there a {colour} {shape}?", "yes"
    # Absent things share a colour or a shape with one that is there, so that both have to be looked at.
    near = [
        (colour, shape) for colour in COLOURS for shape in SHAPES
        if (colour, shape) not in present and any(colour == c or shape == s for c, s in present)
    ]  # fmt: skip
    colour, shape = near[rng.integers(len(near))]
    return f"is there a {colour} {shape}?", "no"


def _ask_relation(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    shapes = _only_once([thing.shape for thing in scene.things])
    if len(shapes) < 2:
        return None
    names = rng.permutation(shapes)[:2]
    first, second = (next(thing for thing in scene.things if thing.shape == name) for name in names)
    true = [relation for relation in MIRRORED if stands(*offset(first, second), relation, ASKED_RELATION_LEAST)]
    if not true:
        return None
    answer, relation = ("yes", true[0]) if rng.random() < 0.5 else ("no", MIRRORED[true[0]])
    return f"is the {first.shape} {relation} the {second.shape}?", answer


def _target(scene: Scene, rng: np.random.Generator) -> tuple[str, tuple[int, ...]]:
    """Name one thing, or all things that share its name; return the name and their indices in the scene."""
    chosen = scene.things[rng.integers(len(scene.things))]
    by_colour = rng.random() < 0.5
    indices = tuple(
        index for index, thing in enumerate(scene.things)
        if thing.shape == chosen.shape and (thing.colour == chosen.colour or not by_colour)
    )  # fmt: skip
    noun = chosen.shape if len(indices) == 1 else PLURALS[chosen.shape]
    return f"the {chosen.colour} {noun}" if by_colour else f"the {noun}", indices


def _changed(scene: Scene, indices: tuple[int, ...], **change: Any) -> tuple[Thing, ...]:
    return tuple(replace(thing, **change) if i in indices else thing for i, thing in enumerate(scene.things))


def _recolour(scene: Scene, rng: np.random.Generator) -> tuple[str, tuple[Thing, ...]]:
    name, indices = _target(scene, rng)
    old = {scene.things[index].colour for index in indices}
    colour = _pick([colour for colour in COLOURS if colour not in old], rng)
    return f"make {name} {colour}", _changed(scene, indices, colour=colour)


def _reshape(scene: Scene, rng: np.random.Generator) -> tuple[str, tuple[Thing, ...]]:
    name, indices = _target(scene, rng)
    shape = _pick([shape for shape in SHAPES if shape != scene.things[indices[0]].shape], rng)
    result = f"a {shape}" if len(indices) == 1 else PLURALS[shape]
    return f"turn {name} into {result}", _changed(scene, indices, shape=shape)


def _resize(scene: Scene, rng: np.random.Generator) -> tuple[str, tuple[Thing, ...]] | None:
    name, indices = _target(scene, rng)
    word = _pick(list(RESIZE), rng)
    things = tuple(
        replace(thing, size=thing.size * RESIZE[word]) if index in indices else thing
        for index, thing in enumerate(scene.things)
    )
    return (f"make {name} {word}", things) if _fit(things) else None


def _remove(scene: Scene, rng: np.random.Generator) -> tuple[str, tuple[Thing, ...]] | None:
    name, indices = _target(scene, rng)
    rest = tuple(thing for index, thing in enumerate(scene.things) if index not in indices)
    return (f"remove {name}", rest) if rest else None


def _add(scene: Scene, rng: np.random.Generator) -> tuple[str, tuple[Thing, ...]] | None:
    if len(scene.things) == MOST_THINGS:
        return None
    shape, colour, size = _pick(SHAPES, rng), _pick(list(COLOURS), rng), float(rng.uniform(*ADDED_DIAMETER))
    added = [Thing(shape, colour, x, y, size) for y in PLACES_TO_ADD for x in PLACES_TO_ADD]
    # A custom for what the instruction leaves open (see `shapes`); of equals, the first in reading order.
    for thing in sorted(added, key=lambda thing: -_clearance(thing, scene.things) // NEAR):
        if _fit((*scene.things, thing)):
            return f"add a {colour} {shape}", (*scene.things, thing)
    return None


def _clearance(thing: Thing, others: Sequence[Thing]) -> float:
    return min(max(map(abs, offset(thing, other))) for other in others)


def _fit(things: tuple[Thing, ...]) -> bool:
    """Return whether all things are large enough to see, inside the image and apart."""
    inside = all(
        thing.size >= LEAST_DIAMETER and max(abs(thing.x - 0.5), abs(thing.y - 0.5)) <= 0.5 - MARGIN - thing.size / 2
        for thing in things
    )
    return inside and all(separate(a, b) for i, a in enumerate(things) for b in things[:i])
