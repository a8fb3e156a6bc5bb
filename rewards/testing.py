"""Check a reward against the contract: ``python -m rewards.testing file.py:name [key=value ...]``.

``key=value`` go to a class's constructor, values as YAML. Exit codes: 0 kept, 1 broken, 2 not found. In a test, call
``check_reward("file.py:name", key=value)``, which raises AssertionError.
"""

import math
import sys
from collections.abc import Callable, Sequence

import numpy as np
import yaml
from PIL import Image, ImageDraw

from rewards import Reward
from vargpt_rl.common.plugins import make_plugin
from vargpt_rl.common.streams import make_outputs_lasting
from vargpt_rl.common.usage import print_usage_if_asked

TOLERANCE = 1e-3
"""Relative difference allowed between one image's scores in different batches."""

PROMPTS = ["a red circle", "a blue square", 'a shop sign that says "OPEN"', "a photograph of a cat on a sofa", "fog"]


class Skipped(Exception):
    """A check does not apply to this reward; the message is the reason."""


def check_reward(path: str, /, **options: object) -> None:
    """Load a reward and print which parts of the contract it keeps. AssertionError if it breaks one.

    ValueError for a bad path or bad options.
    """
    reward = make_plugin(path, options)
    broken = []
    for name, check in CHECKS.items():
        word, said = _outcome(check, reward)
        print(f"{word:8}{name}{said and ': '}{said}")
        if word == "BROKEN":
            broken.append(name)
    if broken:
        raise AssertionError(f"{path} breaks the contract: {'; '.join(broken)}")


def _outcome(check: Callable[[Reward], None], reward: Reward) -> tuple[str, str]:
    try:
        check(reward)
    except Skipped as reason:
        return "skipped", str(reason)
    except Exception as error:  # any exception of the reward breaks the contract
        return "BROKEN", f"{type(error).__name__}: {error}".rstrip(": ")
    return "ok", ""


def images() -> list[Image.Image]:
    """Five different images of 96 x 96 pixels: two shapes, a text, noise and a gradient."""
    red, blue, text = (Image.new("RGB", (96, 96), "white") for _ in range(3))
    ImageDraw.Draw(red).ellipse((24, 24, 72, 72), fill="red")
    ImageDraw.Draw(blue).rectangle((24, 24, 72, 72), fill="blue")
    ImageDraw.Draw(text).text((16, 36), "OPEN", fill="black", font_size=24)
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    gradient = np.linspace(0, 255, 96 * 96 * 3).reshape(96, 96, 3).astype(np.uint8)
    return [red, blue, text, Image.fromarray(noise), Image.fromarray(gradient)]


def _require(kept: bool, otherwise: str) -> None:
    if not kept:
        raise AssertionError(otherwise)


def _call(reward: Reward, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
    """The reward's values, in the right form."""
    values = reward(list(images), list(prompts))
    _require(isinstance(values, list), f"expected a list, got {type(values).__name__}")
    _require(len(values) == len(images), f"{len(values)} values for {len(images)} images")
    for value in values:
        number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        _require(value is None or number, f"expected numbers or None, got {value!r}")
        _require(value is None or not math.isinf(value), "infinite")
    return [None if value is None or math.isnan(value) else float(value) for value in values]


def _scored(reward: Reward) -> list[float | None]:
    values = _call(reward, images(), PROMPTS)
    if all(value is None for value in values):
        raise Skipped("it scores none of the images and prompts used here")
    return values


def _expect(found: Sequence[float | None], expected: Sequence[float | None]) -> None:
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        same = one == other or (
            one is not None and other is not None and math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=1e-6)
        )
        _require(same, f"image {i} has {one}, expected {other} as before")


def _one_value_each(reward: Reward) -> None:
    _call(reward, images(), PROMPTS)


def _no_images(reward: Reward) -> None:
    _call(reward, [], [])


def _alone(reward: Reward) -> None:
    together = _scored(reward)
    _expect([_call(reward, [i], [p])[0] for i, p in zip(images(), PROMPTS, strict=True)], together)


def _order(reward: Reward) -> None:
    forwards = _scored(reward)
    if len(set(forwards)) == 1:
        raise Skipped("it gives all images the same score")
    _expect(_call(reward, images()[::-1], PROMPTS[::-1])[::-1], forwards)


def _repeatable(reward: Reward) -> None:
    first = _scored(reward)
    _expect(_call(reward, images(), PROMPTS), first)


def _unchanged(reward: Reward) -> None:
    given, prompts = images(), list(PROMPTS)
    reward(given, prompts)
    _require(given == images(), "an image was changed")
    _require(prompts == PROMPTS, "a prompt was changed")


def _other_modes(reward: Reward) -> None:
    for mode in ("L", "RGBA", "P"):
        try:
            _call(reward, [image.convert(mode) for image in images()], PROMPTS)
        except ValueError as error:
            raise Skipped(f"it refuses mode {mode}: {error}") from error


CHECKS: dict[str, Callable[[Reward], None]] = {
    "one number or None for each image": _one_value_each,
    "an empty list for no images": _no_images,
    "the same score alone as with others": _alone,
    "scores in the order of the images": _order,
    "the same score each time": _repeatable,
    "images and prompts left as they are": _unchanged,
    "grey, transparent and palette images taken, or refused with a ValueError": _other_modes,
}


def main(arguments: list[str]) -> int:
    """Check the reward that the arguments name; the exit code."""
    print_usage_if_asked(f"usage: {__doc__}", arguments)
    try:
        path, *pairs = arguments
        options = dict(pair.split("=", 1) for pair in pairs)
    except ValueError:
        print("error: expected file.py:name [key=value ...]", file=sys.stderr)
        return 2
    try:
        check_reward(path, **{key: yaml.safe_load(value) for key, value in options.items()})
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except AssertionError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    make_outputs_lasting()
    raise SystemExit(main(sys.argv[1:]))
