"""Exact judge of images of the shapes world: finds the things in an image and compares them with the caption.

Things are connected regions that differ from the background. Each is normalised to its own area and centroid and
compared with templates of the shapes. A thing without a known shape or colour is `UNKNOWN`, so smudges and merged or
two-coloured things count against an image.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from vargpt_rl.common.averages import with_interval
from vargpt_rl.data import shapes
from vargpt_rl.data.samples import Prompt
from vargpt_rl.data.shapes import Requirement, Thing

UNKNOWN = "unknown"
WORKING_SIDE = 128  # larger images are shrunk to this
CONTRAST = 60.0  # RGB distance from the background that makes a pixel part of a thing
LEAST_AREA = 0.006  # of the image; smaller regions are specks
# Intersection over union with the best template below which a region has no known shape. Blur costs corners most, and
# a round region is like a circle long before it is one.
LEAST_OVERLAP = {"circle": 0.89, "square": 0.85, "triangle": 0.85, "cross": 0.79}
LEAST_CHROMA = 40.0  # distance from grey below which a region has no known colour
HUE_TOLERANCE = 20.0  # degrees
LEAST_PURITY = 0.8  # share of a thing's pixels that must be of its colour
SMALL_BELOW, LARGE_ABOVE = 0.315, 0.525  # diameters, midway between the size classes of the scenes
OFF_CENTRE = 0.13  # displacement from the middle that separates the centre from the other places
RELATION_LEAST = 0.05
TEMPLATE_SIDE = 32


@dataclass(frozen=True)
class ImageVerdict:
    """Verdict on an image: correct or the reason why not, and the things found in it."""

    correct: bool
    reason: str
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class _Template:
    shape: str
    area: float  # of a thing of diameter one
    centroid: np.ndarray  # relative to the centre, in diameters
    raster: np.ndarray  # (TEMPLATE_SIDE, TEMPLATE_SIDE) bool, in the normalised frame


def find_things(image: Image.Image) -> list[Thing]:
    """Find the things in a square image of 64 pixels or more. Raises ValueError if it is not square."""
    if image.width != image.height:
        raise ValueError(f"expected a square image, got {image.width} x {image.height}")
    image = image.convert("RGB")
    if image.width > WORKING_SIDE:
        image = image.resize((WORKING_SIDE, WORKING_SIDE), Image.Resampling.BOX)
    pixels = np.asarray(image, np.float32)
    frame = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3),
                            pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])  # fmt: skip
    difference = pixels - np.median(frame, axis=0)
    labels, number = ndimage.label(np.linalg.norm(difference, axis=2) > CONTRAST)
    sizes = np.bincount(labels.ravel(), minlength=number + 1)
    return [
        _thing(pixels, difference, labels, label)
        for label in range(1, number + 1)
        if sizes[label] >= LEAST_AREA * labels.size
    ]


def _thing(pixels: np.ndarray, difference: np.ndarray, labels: np.ndarray, label: int) -> Thing:
    own = labels == label
    typical = np.median(difference[own], axis=0)
    # Share of each pixel that the thing covers: where the pixel's colour lies between the background's and the thing's.
    coverage = np.clip(difference @ typical / (typical @ typical), 0, 1)
    coverage *= ndimage.binary_dilation(own, iterations=2) & (own | (labels == 0))
    area = coverage.sum()
    rows, columns = np.indices(coverage.shape)
    cy, cx = (rows * coverage).sum() / area, (columns * coverage).sum() / area
    shape, template = _nearest_shape(coverage, cx, cy, math.sqrt(area))
    size = math.sqrt(area / template.area)
    x, y = (np.array([cx, cy]) + 0.5 - template.centroid * size) / len(labels)
    colour = _nearest_colour(pixels[ndimage.binary_erosion(own)])
    return Thing(shape, colour, float(x), float(y), size / len(labels))


def _nearest_shape(coverage: np.ndarray, cx: float, cy: float, scale: float) -> tuple[str, _Template]:
    """Return the shape of a region, or UNKNOWN, and the template that fits best."""
    steps = _frame_steps() * scale
    grid = np.meshgrid(cy + steps, cx + steps, indexing="ij")
    region = ndimage.map_coordinates(coverage, grid, order=1) > 0.5
    rasters = np.stack([template.raster for template in _templates()])
    overlaps = (rasters & region).sum(axis=(1, 2)) / (rasters | region).sum(axis=(1, 2))
    best = _templates()[int(overlaps.argmax())]
    return (best.shape if overlaps.max() >= LEAST_OVERLAP[best.shape] else UNKNOWN), best


def _frame_steps() -> np.ndarray:
    """Return sample positions of the normalised frame: two roots of the area wide, around the centroid."""
    return (np.arange(TEMPLATE_SIDE) + 0.5) / TEMPLATE_SIDE * 2 - 1


@cache
def _templates() -> tuple[_Template, ...]:
    tilts = np.linspace(-shapes.MAX_TILT, shapes.MAX_TILT, 5)
    return tuple(_template(shape, tilt) for shape in shapes.SHAPES for tilt in tilts)


def _template(shape: str, tilt: float) -> _Template:
    corners = shapes.outline(Thing(shape, UNKNOWN, 0, 0, 1), tilt)
    following = np.roll(corners, -1, axis=0)
    cross = corners[:, 0] * following[:, 1] - corners[:, 1] * following[:, 0]
    area = cross.sum() / 2
    centroid = ((corners + following) * cross[:, None]).sum(axis=0) / (6 * area)
    framed = (corners - centroid) / math.sqrt(area)
    canvas = Image.new("L", (4 * TEMPLATE_SIDE,) * 2)
    ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in (framed + 1) / 2 * canvas.width], fill=255)
    return _Template(shape, area, centroid, np.asarray(canvas.reduce(4)) > 127)


def _hue(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the angle in degrees and the distance from grey of (..., 3) RGB values."""
    red, green, blue = np.moveaxis(np.asarray(pixels, np.float32), -1, 0)
    a, b = red - (green + blue) / 2, (green - blue) * math.sqrt(3) / 2
    return np.degrees(np.arctan2(b, a)), np.hypot(a, b)


def _nearest_colour(pixels: np.ndarray) -> str:
    """Return the colour of most of the (n, 3) pixels, or UNKNOWN if they are mixed, greyish or between two colours."""
    angles, chroma = _hue(pixels)
    known, _ = _hue(np.array(list(shapes.COLOURS.values())))
    apart = np.abs((angles[:, None] - known + 180) % 360 - 180)
    fits = (apart.min(axis=1) <= HUE_TOLERANCE) & (chroma >= LEAST_CHROMA)
    votes = np.bincount(apart.argmin(axis=1)[fits], minlength=len(known))
    return list(shapes.COLOURS)[int(votes.argmax())] if votes.max() > LEAST_PURITY * len(pixels) else UNKNOWN


def check(image: Image.Image, caption: str) -> ImageVerdict:
    """Check that `image` shows what `caption` demands and nothing more. Raises ValueError for a foreign caption."""
    things = tuple(find_things(image))
    reason = _fault(things, shapes.parse(caption))
    return ImageVerdict(not reason, reason, things)


def _fault(things: tuple[Thing, ...], requirement: Requirement) -> str:
    number = sum(wanted.count for wanted in requirement.wanted)
    if len(things) != number:
        return f"expected {number} things, found {len(things)}"
    # Wanted things always differ in shape, so the shape alone says which is which.
    for wanted in requirement.wanted:
        of_shape = [thing for thing in things if thing.shape == wanted.shape]
        if len(of_shape) != wanted.count:
            return f"expected {wanted.count} of shape {wanted.shape}, found {len(of_shape)}"
        for thing in of_shape:
            if wanted.colour not in (None, thing.colour):
                return f"expected a {wanted.colour} {wanted.shape}, found a {thing.colour} one"
            if thing.colour == UNKNOWN:
                return f"the {thing.shape} has no clear colour"
            if wanted.size not in (None, size_class(thing)):
                return f"expected a {wanted.size} {wanted.shape}, found a diameter of {thing.size:.2f}"
    if requirement.place and not _in_place(things[0], requirement.place):
        return f"the {things[0].shape} is not {shapes.PLACES[requirement.place]}"
    if requirement.relation:
        first, second = (next(t for t in things if t.shape == wanted.shape) for wanted in requirement.wanted)
        if not shapes.stands(*shapes.offset(first, second), requirement.relation, RELATION_LEAST):
            return f"the {first.shape} is not {requirement.relation} the {second.shape}"
    return ""


def size_class(thing: Thing) -> str | None:
    """Return the size class of a thing as captions name it, or None between small and large."""
    if thing.size < SMALL_BELOW:
        return "small"
    return "large" if thing.size > LARGE_ABOVE else None


def _in_place(thing: Thing, place: str) -> bool:
    dx, dy = thing.x - 0.5, thing.y - 0.5
    if place == "centre":
        return max(abs(dx), abs(dy)) < OFF_CENTRE
    relation = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}[place]
    return shapes.stands(dx, dy, relation, OFF_CENTRE)


class ShapesCheck:
    """`check` for images of shapes captions: the `vargpt_rl.data.sources.ImageCheck` of generated images."""

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[ImageVerdict]:
        return [check(image, prompt.text) for image, prompt in zip(images, prompts, strict=True)]

    def skills(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the task of each caption."""
        return [shapes.parse(prompt.text).task for prompt in prompts]

    def values(self, verdicts: Sequence[ImageVerdict]) -> list[float]:
        """Return 1 for each correct image, else 0."""
        return [float(verdict.correct) for verdict in verdicts]

    def scores(self, prompts: Sequence[Prompt], verdicts: Sequence[ImageVerdict]) -> dict[str, float]:
        """Share of correct images over all ("overall", with its interval) and by task."""
        by_task = defaultdict(list)
        values = self.values(verdicts)
        for skill, value in zip(self.skills(prompts), values, strict=True):
            by_task[skill].append(value)
        tasks = {task: float(np.mean(values)) for task, values in sorted(by_task.items())}
        captions = [prompt.text for prompt in prompts]
        return {**with_interval("overall", values, captions), "n": len(verdicts), **tasks}
