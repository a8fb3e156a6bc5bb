"""The shapes world: captions, the scenes they describe, and images of those scenes.

A caption comes from a small closed grammar with the six tasks of GenEval in miniature. The grammar is written out in
full (some two thousand captions), so that `parse` is a look-up and exactly inverts it. A scene is a layout that
satisfies its caption: what the caption leaves open (a colour, a place) has its default, and everything stands and
measures a little differently each time. `render` draws it in one of three styles:

- "clean": plain near-white background, saturated colours;
- "commercial": the same with a thin darker outline, the images of a strong system;
- "corpus": tinted background, dull colours, small rotations, blur and noise, and now and then an image that
  disagrees with its caption.
"""

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 45, 45),
    "green": (45, 160, 70),
    "blue": (45, 85, 215),
    "yellow": (240, 200, 40),
    "purple": (150, 60, 190),
    "cyan": (40, 190, 215),
}
SHAPES = ("circle", "square", "triangle", "cross")
TASKS = ("single_object", "two_objects", "counting", "colours", "position", "colour_attribution")
STYLES = ("clean", "commercial", "corpus")
SIZES = ("small", "large")
PLACES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
}
MIRRORED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}

MARGIN = 0.04  # least distance of a thing from the image's edge
GAP = 0.07  # least distance between two things
HELD_OUT_SHARE = 0.12
WRONG_RATE = 0.1  # share of "corpus" images that disagree with their caption
MAX_TILT = 5.0  # degrees, "corpus" only
BACKGROUND = (250, 250, 250)

# Diameters as fractions of the side, by size class; None is a single thing of no stated size.
DIAMETERS = {None: (0.38, 0.46), "small": (0.22, 0.27), "large": (0.57, 0.65)}
PLACED_DIAMETER = (0.32, 0.38)
SEVERAL_DIAMETERS = {2: (0.29, 0.35), 3: (0.25, 0.30), 4: (0.23, 0.28)}

# Defaults where a caption does not say: the colour of a shape, and where things stand. A small model that
# draws the bits of a scale independently of each other can commit to one custom; between equal alternatives it mixes.
USUAL_COLOUR = {"circle": "red", "square": "blue", "triangle": "green", "cross": "purple"}
LOW, MIDDLE, HIGH = 0.25, 0.5, 0.75
PLACED = {
    None: (MIDDLE, MIDDLE),
    "left": (LOW, MIDDLE),
    "right": (HIGH, MIDDLE),
    "top": (MIDDLE, LOW),
    "bottom": (MIDDLE, HIGH),
    "centre": (MIDDLE, MIDDLE),
}
RELATED = {
    None: (PLACED["left"], PLACED["right"]),
    "left of": (PLACED["left"], PLACED["right"]),
    "right of": (PLACED["right"], PLACED["left"]),
    "above": (PLACED["top"], PLACED["bottom"]),
    "below": (PLACED["bottom"], PLACED["top"]),
}
GROUPED = {
    3: ((MIDDLE, LOW), (LOW, HIGH), (HIGH, HIGH)),
    4: ((LOW, LOW), (HIGH, LOW), (LOW, HIGH), (HIGH, HIGH)),
}
JITTER = 0.03  # how far from there


@dataclass(frozen=True)
class Thing:
    """One coloured shape; centre (`x` to the right, `y` down) and diameter as fractions of the image's side."""

    shape: str
    colour: str
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    """A layout of things and the caption it satisfies."""

    caption: str
    task: str
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Described:
    """`count` things of one shape; a colour or size class ("small", "large") of None leaves it free."""

    shape: str
    colour: str | None = None
    size: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Requirement:
    """Demands of a caption: these things and no others.

    `place` (a key of `PLACES`) is where the only thing stands; `relation` (a key of `MIRRORED`) is how the first of
    two wanted things stands to the second.
    """

    task: str
    wanted: tuple[Described, ...]
    place: str | None = None
    relation: str | None = None


def _noun_phrase(wanted: Described) -> str:
    number, noun = ("a", wanted.shape) if wanted.count == 1 else (NUMBERS[wanted.count], PLURALS[wanted.shape])
    return " ".join(word for word in (number, wanted.size, wanted.colour, noun) if word)


def _caption(requirement: Requirement) -> str:
    first, *second = (_noun_phrase(wanted) for wanted in requirement.wanted)
    if second:
        return f"{first} {requirement.relation or 'and'} {second[0]}"
    return f"{first} {PLACES[requirement.place]}" if requirement.place else first


def _forms() -> Iterator[list[Requirement]]:
    """Write out the whole grammar, one list for each form of caption."""
    coloured = [Described(shape, colour) for colour in COLOURS for shape in SHAPES]
    pairs = [(a, b) for a, b in itertools.permutations(coloured, 2) if a.shape != b.shape and a.colour != b.colour]
    yield [Requirement("single_object", (Described(shape),)) for shape in SHAPES]
    yield [Requirement("single_object", (Described(shape, size=size),)) for shape in SHAPES for size in SIZES]
    yield [Requirement("two_objects", (Described(a), Described(b))) for a, b in itertools.permutations(SHAPES, 2)]
    yield [Requirement("counting", (Described(shape, count=n),)) for shape in SHAPES for n in (2, 3, 4)]
    yield [Requirement("counting", (replace(thing, count=n),)) for thing in coloured for n in (2, 3, 4)]
    yield [Requirement("colours", (thing,)) for thing in coloured]
    yield [Requirement("colours", (replace(thing, size=size),)) for thing in coloured for size in SIZES]
    yield [Requirement("position", (thing,), place=place) for thing in coloured for place in PLACES]
    yield [Requirement("position", pair, relation=relation) for pair in pairs for relation in MIRRORED]
    yield [Requirement("colour_attribution", pair) for pair in pairs]


_FORMS = [{_caption(requirement): requirement for requirement in form} for form in _forms()]
_GRAMMAR = {caption: requirement for form in _FORMS for caption, requirement in form.items()}


def parse(caption: str) -> Requirement:
    """Return what `caption` demands. Raises ValueError if it is not in the grammar."""
    if caption not in _GRAMMAR:
        raise ValueError(f"not a caption of the shapes world: {caption!r}")
    return _GRAMMAR[caption]


def is_held_out(caption: str) -> bool:
    """Return whether `caption` is held out for evaluation. Two wordings of one meaning share their split."""
    requirement = parse(caption)
    wordings = [caption]
    if len(requirement.wanted) == 2:
        mirrored = MIRRORED[requirement.relation] if requirement.relation else None
        wordings.append(_caption(replace(requirement, wanted=requirement.wanted[::-1], relation=mirrored)))
    # The salt is chosen such that every task, however few its captions, holds out some and keeps most.
    digest = hashlib.sha256(f"shapes 6871:{min(wordings)}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


@cache
def captions(task: str, split: str) -> tuple[tuple[str, ...], ...]:
    """Return a task's captions in a split ("train" or "held_out"), by form. Raises ValueError if there are none."""
    held_out = {"train": False, "held_out": True}
    if task not in TASKS or split not in held_out:
        raise ValueError(f"no captions for task {task!r}, split {split!r}")
    groups = (
        tuple(
            caption
            for caption, requirement in form.items()
            if requirement.task == task and is_held_out(caption) == held_out[split]
        )
        for form in _FORMS
    )
    return tuple(group for group in groups if group)


def sample_scene(rng: np.random.Generator, task: str | None = None, split: str = "train") -> Scene:
    """Sample a scene of `task` (any task if None) whose caption belongs to `split`."""
    forms = captions(task or str(rng.choice(TASKS)), split)
    # Form first: the relations would otherwise crowd out the absolute places, being far more numerous.
    form = forms[rng.integers(len(forms))]
    return scene_for(form[rng.integers(len(form))], rng)


def scene_for(caption: str, rng: np.random.Generator) -> Scene:
    """Sample a layout that satisfies `caption`. Raises ValueError if the caption is not in the grammar."""
    requirement = parse(caption)
    wanted = [kind for kind in requirement.wanted for _ in range(kind.count)]
    if len(wanted) == 1:
        centres: tuple[tuple[float, float], ...] = (PLACED[requirement.place],)
        sizes = PLACED_DIAMETER if requirement.place else DIAMETERS[wanted[0].size]
    else:
        centres = RELATED[requirement.relation] if len(wanted) == 2 else GROUPED[len(wanted)]
        sizes = SEVERAL_DIAMETERS[len(wanted)]
    things = tuple(_place(kind, centre, sizes, rng) for kind, centre in zip(wanted, centres, strict=True))
    return Scene(caption, requirement.task, things)


def _place(
    wanted: Described, centre: tuple[float, float], sizes: tuple[float, float], rng: np.random.Generator
) -> Thing:
    at_x, at_y = (at + rng.uniform(-JITTER, JITTER) for at in centre)
    size = float(rng.uniform(*sizes))
    least = MARGIN + size / 2
    x, y = (float(np.clip(at, least, 1 - least)) for at in (at_x, at_y))
    return Thing(wanted.shape, wanted.colour or USUAL_COLOUR[wanted.shape], x, y, size)


def separate(a: Thing, b: Thing) -> bool:
    """Return whether the boxes around two things keep a clear gap."""
    return max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.size + b.size) / 2 + GAP


def offset(a: Thing, b: Thing) -> tuple[float, float]:
    """Return how far the centre of `a` is to the right of and below the centre of `b`."""
    return a.x - b.x, a.y - b.y


def stands(dx: float, dy: float, relation: str, least: float) -> bool:
    """Return whether what is `dx` to the right and `dy` below stands in `relation` (a key of `MIRRORED`).

    The offset must be at least `least`, and clearly larger than the one across.
    """
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    if relation in ("left of", "above"):
        along = -along
    return along >= least and along >= abs(across) + least / 3


def outline(thing: Thing, tilt: float = 0.0) -> np.ndarray:
    """Return the corners of `thing` as an (n, 2) array of x, y in fractions of the side, turned by `tilt` degrees."""
    unit = _unit_outline(thing.shape)
    c, s = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
    return unit @ np.array([[c, s], [-s, c]]) * thing.size + (thing.x, thing.y)


@cache
def _unit_outline(shape: str) -> np.ndarray:
    """Corners of a shape of diameter one around the origin."""
    if shape == "circle":
        turn = np.linspace(0, 2 * math.pi, 96, endpoint=False)
        return np.stack([np.cos(turn), np.sin(turn)], axis=1) / 2
    if shape == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.44
    if shape == "triangle":
        return np.array([(0, -0.45), (0.5, 0.45), (-0.5, 0.45)])
    if shape == "cross":
        arm, half = 0.5, 0.17
        return np.array([
            (-half, -arm), (half, -arm), (half, -half), (arm, -half), (arm, half), (half, half),
            (half, arm), (-half, arm), (-half, half), (-arm, half), (-arm, -half), (-half, -half),
        ])  # fmt: skip
    raise ValueError(f"unknown shape {shape!r}")


def render(scene: Scene, side: int, style: str, rng: np.random.Generator) -> Image.Image:
    """Render `scene` as an RGB image, `side` pixels wide and high, in one of `STYLES`. Raises ValueError for others."""
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}, expected one of {STYLES}")
    supersampling = 4 if side <= 256 else 2
    if style == "corpus":
        return _render_corpus(scene, side, supersampling, rng)
    canvas = Image.new("RGB", (side * supersampling,) * 2, BACKGROUND)
    border = max(supersampling, round(0.012 * canvas.width)) if style == "commercial" else 0
    for thing in scene.things:
        _draw(canvas, thing, COLOURS[thing.colour], border)
    return canvas.reduce(supersampling)


def _draw(canvas: Image.Image, thing: Thing, colour: tuple[int, ...], border: int = 0, tilt: float = 0.0) -> None:
    corners = [tuple(corner) for corner in outline(thing, tilt) * canvas.width]
    edge = tuple(int(0.65 * channel) for channel in colour) if border else None
    ImageDraw.Draw(canvas).polygon(corners, fill=colour, outline=edge, width=border or 1)


def _render_corpus(scene: Scene, side: int, supersampling: int, rng: np.random.Generator) -> Image.Image:
    things = scene.things
    if rng.random() < WRONG_RATE:
        things = _disagreeing(scene, rng)
    base = rng.uniform(222, 234) + rng.uniform(-3, 3, 3)
    corners = (base + rng.uniform(-4, 4, (2, 2, 1))).astype(np.uint8)
    canvas = Image.fromarray(corners).resize((side * supersampling,) * 2, Image.Resampling.BICUBIC)
    for thing in things:
        pure = np.array(COLOURS[thing.colour], float)
        dulled = pure + rng.uniform(0.05, 0.25) * (150 - pure) + rng.uniform(-10, 10, 3)
        colour = tuple(int(channel) for channel in np.clip(dulled, 0, 255))
        _draw(canvas, thing, colour, tilt=rng.uniform(-MAX_TILT, MAX_TILT))
    blurred = canvas.reduce(supersampling).filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.8) * side / 128))
    noisy = np.asarray(blurred, np.float32) + 3 * rng.standard_normal((side, side, 3), np.float32)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def _disagreeing(scene: Scene, rng: np.random.Generator) -> tuple[Thing, ...]:
    """Return the scene's things with one shape or (if the caption states it) colour changed, or one missing."""
    things = list(scene.things)
    index = int(rng.integers(len(things)))
    thing = things.pop(index)
    faults = ["shape"]
    if thing.colour in scene.caption.split():
        faults.append("colour")
    if things:
        faults.append("missing")
    fault = rng.choice(faults)
    if fault == "shape":
        things.insert(index, replace(thing, shape=_another(SHAPES, thing.shape, rng)))
    elif fault == "colour":
        things.insert(index, replace(thing, colour=_another(COLOURS, thing.colour, rng)))
    return tuple(things)


def _another(choices: Iterable[str], but: str, rng: np.random.Generator) -> str:
    return str(rng.choice([choice for choice in choices if choice != but]))
