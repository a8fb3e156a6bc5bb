"""Conversations about images of the shapes world: drawings, edits and questions, several in a row."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vargpt_rl.data.shapes import PLACES, Scene, Thing, sample_scene
from vargpt_rl.data.shapes_check import size_class
from vargpt_rl.data.shapes_tasks import edit, question
from vargpt_rl.model.prompt import REPLY

EDGE = 0.4
"""Distance from an edge, in sides, within which a thing is said to stand there."""
DESCRIBE = "what do you see?"
SMALL_TALK = {
    "hello": "hello! i draw coloured shapes.",
    "hello, who are you?": "a tiny model that draws coloured shapes.",
    "who are you?": "a tiny model that draws coloured shapes.",
    "what can you do?": "i draw circles, squares, triangles and crosses, change them, and answer questions.",
    "thank you": "you are welcome.",
}
"""What people say first, and the answers."""


@dataclass(frozen=True)
class ShapesTurn:
    """A turn of the user, and the reply: words, or an image of ``drawn`` after `REPLY`."""

    text: str
    reply: str = REPLY
    shown: Scene | None = None
    """Scene of the image that the user shows."""
    drawn: Scene | None = None


@dataclass(frozen=True)
class ShapesDialogue:
    """A conversation, all of whose images are in one style."""

    turns: tuple[ShapesTurn, ...]
    style: str


def describe(scene: Scene) -> str:
    """List the things of a scene in reading order, each with its place; of a single one also its size class."""
    ordered = sorted(scene.things, key=lambda thing: (_part(thing.y), _part(thing.x), thing.y, thing.x))
    size = size_class(ordered[0]) if len(ordered) == 1 else None
    return " and ".join(_phrase(thing, size) for thing in ordered)


def _part(at: float) -> int:
    """Return 0 near the first edge, 2 near the other, else 1."""
    return 0 if at < EDGE else 2 if at > 1 - EDGE else 1


def _phrase(thing: Thing, size: str | None) -> str:
    row = ("top", None, "bottom")[_part(thing.y)]
    column = ("left", None, "right")[_part(thing.x)]
    places = [PLACES[place] for place in (row, column) if place] or [PLACES["centre"]]
    return " ".join(word for word in ("a", size, thing.colour, thing.shape, *places) if word)


def ask(scene: Scene, rng: np.random.Generator, described: float = 0.5) -> tuple[str, str]:
    """Make a question about an image of a scene and its answer; a share of ``described`` asks for all that is there."""
    return (DESCRIBE, describe(scene)) if rng.random() < described else question(scene, rng)


def varied_scene(rng: np.random.Generator, split: str = "train") -> Scene:
    """Sample a scene of a caption, half of them changed by an edit: then no caption may describe it."""
    scene = sample_scene(rng, split=split)
    return edit(scene, rng)[1] if rng.random() < 0.5 else scene


def dialogue(rng: np.random.Generator, turns: int, split: str = "train") -> ShapesDialogue:
    """Make a conversation. It begins with a drawing, with an image that the user shows, or with small talk.

    Questions and edits are about the latest image. Every second one shows it again, as chats do that need it seen.
    """
    latest: Scene | None = None
    made: list[ShapesTurn] = []
    for _ in range(turns):
        kind = str(rng.choice(list(_KINDS), p=_SHARES if latest else _FIRST))
        turn = _KINDS[kind](latest, rng, split)
        made.append(turn)
        latest = turn.drawn or turn.shown or latest
    shows = made[0].shown is not None
    style = str(rng.choice(["commercial", "clean"] if shows else ["clean", "clean", "corpus"]))
    return ShapesDialogue(tuple(made), style)


def _draw(latest: Scene | None, rng: np.random.Generator, split: str) -> ShapesTurn:
    scene = sample_scene(rng, split=split)
    return ShapesTurn(scene.caption, drawn=scene)


def _ask(latest: Scene | None, rng: np.random.Generator, split: str) -> ShapesTurn:
    scene = latest or varied_scene(rng, split)
    return ShapesTurn(*ask(scene, rng, described=0.3), shown=_shown(latest, scene, rng))


def _change(latest: Scene | None, rng: np.random.Generator, split: str) -> ShapesTurn:
    scene = latest or sample_scene(rng, split=split)
    instruction, after = edit(scene, rng)
    return ShapesTurn(instruction, shown=_shown(latest, scene, rng), drawn=after)


def _shown(latest: Scene | None, scene: Scene, rng: np.random.Generator) -> Scene | None:
    return scene if latest is None or rng.random() < 0.5 else None


def _talk(latest: Scene | None, rng: np.random.Generator, split: str) -> ShapesTurn:
    text = str(rng.choice(list(SMALL_TALK)))
    return ShapesTurn(text, SMALL_TALK[text])


_KINDS: dict[str, Callable[[Scene | None, np.random.Generator, str], ShapesTurn]] = {
    "draw": _draw,
    "ask": _ask,
    "change": _change,
    "talk": _talk,
}
_SHARES = (0.38, 0.25, 0.35, 0.02)
_FIRST = (0.83, 0.05, 0.10, 0.02)
