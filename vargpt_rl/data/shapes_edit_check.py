"""Exact judge of edits in the shapes world: checks that what was asked for has changed, and nothing else.

The scenes before and after say what should be where; `shapes_check.find_things` says what is there. A thing that
changes keeps its place, as all others do; an added one may stand anywhere that is free.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from vargpt_rl.common.averages import mean_and_error, with_interval
from vargpt_rl.data import shapes
from vargpt_rl.data.samples import Prompt
from vargpt_rl.data.shapes import Scene, Thing
from vargpt_rl.data.shapes_check import find_things

SHIFT = 0.12
"""Largest distance of a thing's centre from its place, in sides; things of a scene are over twice as far apart."""
GROWTH = 1.18
"""Largest factor by which a diameter may be off: under halfway to that of an edit to larger (1.4) or smaller (0.7)."""


@dataclass(frozen=True)
class EditVerdict:
    """``done``: what was asked for has changed; ``kept``: the rest has not; ``reason`` is empty if both."""

    done: bool
    kept: bool
    reason: str

    @property
    def correct(self) -> bool:
        return self.done and self.kept


def check_edit(before: Scene, after: Scene, image: Image.Image) -> EditVerdict:
    """Check that ``image`` shows ``after``: what changed from ``before`` has changed, and the rest has not."""
    left = find_things(image)
    rest, changed, added = [], [], []
    for thing in after.things:
        kind = rest if thing in before.things else changed if _in_place(thing, before.things) else added
        kind.append(thing)
    lost = [thing for thing in rest if not _take(left, thing)]
    undone = [thing for thing in changed if not _take(left, thing)]
    undone += [thing for thing in added if not _take(left, thing, anywhere=True)]
    # Things left over stand where one should have changed or been removed, or were not asked for.
    places = [thing for thing in before.things if thing not in after.things]
    still = [thing for thing in left if _in_place(thing, places)]
    surplus = [thing for thing in left if not _in_place(thing, places)]
    reasons = [
        *(f"the {thing.colour} {thing.shape} is not as it was" for thing in lost),
        *(f"there should be a {thing.colour} {thing.shape}" for thing in undone),
        *(f"the {thing.colour} {thing.shape} should not be there any more" for thing in still),
        *(f"nobody asked for the {thing.colour} {thing.shape}" for thing in surplus),
    ]
    return EditVerdict(not undone and not still, not lost and not surplus, "; ".join(reasons))


def _in_place(thing: Thing, others: Sequence[Thing]) -> bool:
    return any(math.hypot(*shapes.offset(thing, other)) < SHIFT for other in others)


def _take(found: list[Thing], thing: Thing, anywhere: bool = False) -> bool:
    """Remove a match of ``thing`` from ``found``; return whether there was one."""
    for candidate in found:
        alike = (candidate.shape, candidate.colour) == (thing.shape, thing.colour)
        in_size = 1 / GROWTH < candidate.size / thing.size < GROWTH
        if alike and (anywhere or (in_size and _in_place(candidate, [thing]))):
            found.remove(candidate)
            return True
    return False


@dataclass(frozen=True)
class EditCheck:
    """`check_edit` for generated edits; ``scene`` gives the scene of an image key.

    A prompt shows the key of the scene before the edit; its id is the key of the scene after it.
    """

    scene: Callable[[str], Scene]

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[EditVerdict]:
        return [check_edit(*self.scenes(prompt), image) for image, prompt in zip(images, prompts, strict=True)]

    def scenes(self, prompt: Prompt) -> tuple[Scene, Scene]:
        """Return the scenes before and after."""
        assert prompt.shown is not None  # an edit's prompt shows the image before it
        return self.scene(prompt.shown), self.scene(prompt.id)

    def skills(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the kind of each edit."""
        return [kind_of(*self.scenes(prompt)) for prompt in prompts]

    def values(self, verdicts: Sequence[EditVerdict]) -> list[float]:
        """Return 1 for each correct edit, else 0."""
        return [float(verdict.correct) for verdict in verdicts]

    def scores(self, prompts: Sequence[Prompt], verdicts: Sequence[EditVerdict]) -> dict[str, float]:
        """Return shares of correct edits: "overall", with its interval, by kind, and of "done" and "kept"."""
        by_kind = defaultdict(list)
        for kind, verdict in zip(self.skills(prompts), verdicts, strict=True):
            by_kind[kind].append(float(verdict.correct))
        shares = {kind: mean_and_error(values)[0] for kind, values in sorted(by_kind.items())}
        return {
            **with_interval("overall", self.values(verdicts)),
            "n": len(verdicts),
            "done": mean_and_error([float(verdict.done) for verdict in verdicts])[0],
            "kept": mean_and_error([float(verdict.kept) for verdict in verdicts])[0],
            **shares,
        }


def kind_of(before: Scene, after: Scene) -> str:
    """Return what an edit changes: add, remove, shape, colour or size."""
    if len(after.things) != len(before.things):
        return "add" if len(after.things) > len(before.things) else "remove"
    return next(_differences(before, after))


def _differences(before: Scene, after: Scene) -> Iterator[str]:
    for old, new in zip(before.things, after.things, strict=True):
        for name in ("shape", "colour", "size"):
            if getattr(old, name) != getattr(new, name):
                yield name
