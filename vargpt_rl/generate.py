"""Generate images: ``vargpt-rl generate prompt="a red circle" out=DIR [key=value ...]``, or ``vargpt-rl draw PROMPT``.

Writes PNG files named after the numbers of prompt and image, and ``images.jsonl`` with a line for each. Repeating the
command resumes it after the last recorded batch; other settings need another folder. Exit codes: 0 done, 1 failed,
2 a setting or an input is wrong.

The seed of an image depends on ``seed`` and those two numbers, and the image on its seed, not on its batch, up to
rounding: batches of another shape add up in another order, which rarely flips a bit in float32 (one image in dozens at
512 px) but often does in bfloat16. With ``batch_size=1`` images are bit-identical.
"""

import logging
import re
import sys
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from vargpt_rl.common.command import load_command, run_command, run_program
from vargpt_rl.common.settings import Count
from vargpt_rl.data.images import read_image
from vargpt_rl.data.quarantine import Quarantine
from vargpt_rl.data.sources import prompts_from_file
from vargpt_rl.inference.conversation import load
from vargpt_rl.inference.images import (
    DrawingSettings,
    Look,
    batches,
    draw_batch,
    draw_missing,
    image_line,
    make_folder,
    save_image,
)
from vargpt_rl.model.drawing_defaults import NO_EDITS
from vargpt_rl.model.hub import check_model

logger = logging.getLogger(__name__)

THINNEST = 200
"""Ratio of the sides of an image that vision towers still take (Qwen2-VL's image processor)."""


@dataclass(kw_only=True)
class PromptSettings(DrawingSettings):
    """Settings of the commands that draw prompts."""

    image: str | None = None
    """An image file for the prompts to edit."""
    images: Count = 1
    """Images per prompt."""
    batch_size: Count = 8
    """Images drawn at once."""


@dataclass(kw_only=True)
class GenerateConfig(PromptSettings):
    """Settings of this command: either ``prompt`` or ``prompts`` must be given."""

    out: str
    """Output folder."""
    prompt: str | None = None
    """A single prompt."""
    prompts: str | None = None
    """A file of prompts: .txt, or .jsonl with key "prompt"."""

    def __post_init__(self):
        super().__post_init__()
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("expected either prompt=... or prompts=FILE")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("prompt= is empty")


@dataclass(kw_only=True)
class DrawConfig(PromptSettings):
    """Settings of `draw`."""

    out: str = "images"
    """Folder of the images, named after their prompts."""


def read_prompts(config: GenerateConfig) -> list[str]:
    """Read the prompts; bad lines of their file are recorded in ``quarantine.jsonl``."""
    if config.prompt is not None:
        return [config.prompt]
    assert config.prompts is not None  # one of the two is given
    quarantine = Quarantine(Path(config.out, "quarantine.jsonl"))
    try:
        prompts = prompts_from_file(Path(config.prompts), quarantine)
    except ValueError as error:
        raise ValueError(f"prompts={error}") from error
    if quarantine.lost:
        logger.warning("%d lines of %s have no prompt, see %s", quarantine.lost, config.prompts, quarantine.path)
    return [prompt.text for prompt in prompts]


def image_to_edit(config: PromptSettings) -> Look | None:
    """Return what gives ``image`` to each prompt; None without one. ValueError if it cannot be read."""
    if config.image is None:
        return None
    if not config.image:
        raise ValueError("image= is empty")
    try:
        image = read_image(Path(config.image))
    except ValueError as error:
        raise ValueError(f"image={error}") from error
    if max(image.size) > THINNEST * min(image.size):
        raise ValueError(
            f"image={config.image}: {image.width} x {image.height} pixels, expected sides of at most {THINNEST}:1"
        )
    if config.defaults.edits is False:
        logger.warning("%s %s", config.checkpoint, NO_EDITS)
    return lambda _: image


def plan(config: GenerateConfig, folder: str, prompts: list[str]) -> list[dict]:
    """Make the line of ``images.jsonl`` for every wanted image."""
    image = config.image and str(Path(config.image).resolve())
    return [
        image_line(config, f"{i:05d}-{k:02d}.png", prompt, i, k, image) | {"checkpoint": folder}
        for i, prompt in enumerate(prompts)
        for k in range(config.images)
    ]


def generate(config: GenerateConfig) -> None:
    """Draw missing images. Raises ValueError naming the wrong key, before loading the model."""
    folder = check_model(config.checkpoint)
    look = image_to_edit(config)
    out = make_folder(config.out)
    wanted = plan(config, folder, read_prompts(config))
    made = draw_missing(
        wanted,
        out,
        lambda: load(folder, config.device, config.dtype),
        config.batch_size,
        look=look,
    )
    there = len(wanted) - made
    already = f", {there} {'was' if there == 1 else 'were'} there already" if there else ""
    print(f"{made} image{'' if made == 1 else 's'} made{already}: {out.resolve()}")


def draw(config: DrawConfig, prompts: list[str]) -> None:
    """Draw images of some prompts and print the path of each. Nothing that exists is written over."""
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError(f"expected a prompt, got {'an empty one' if prompts else 'none'}")
    folder = check_model(config.checkpoint)
    look = image_to_edit(config)
    out = make_folder(config.out)
    lines = [
        image_line(config, "", prompt, i, k, config.image)
        for i, prompt in enumerate(prompts)
        for k in range(config.images)
    ]
    model, chat = load(folder, config.device, config.dtype)
    for batch in batches(lines, config.batch_size):
        for line, image in zip(batch, draw_batch(model, chat, batch, look), strict=True):
            path = free_path(out, line["prompt"])
            save_image(image, path)
            print(path, flush=True)


def free_path(out: Path, prompt: str) -> Path:
    """Return the first free file name for an image of a prompt."""
    stem = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60] or "image"
    names = (f"{stem}.png" if k == 0 else f"{stem}-{k + 1}.png" for k in count())
    return next(out / name for name in names if not (out / name).exists())


def main_draw(prompts: list[str], settings: list[str]) -> int:
    """Run `draw`; return its exit code."""
    return run_program(lambda given: draw(load_command(DrawConfig, given), prompts), settings)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(GenerateConfig, generate, arguments)


if __name__ == "__main__":
    sys.exit(main())
