"""Draw prompts: ``python -m vargpt_rl.generate prompt="a red circle" out=DIR [key=value ...]``.

Writes PNG files named after the numbers of prompt and image, and ``images.jsonl`` with a line for each. The same
command goes on after the last batch that is recorded; other settings want another folder. Exit codes: 0 done, 1 failed,
2 a setting or an input is wrong.

The seed of an image follows from ``seed`` and those two numbers, and the image from its seed, whatever the batch it
is drawn in, up to rounding: a batch of another shape is added up in another order, which in float32 seldom turns a bit
(one image in dozens at 512 px), in bfloat16 often. With ``batch_size=1`` images are the same to the bit.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from vargpt_rl.common.command import run_command
from vargpt_rl.data.images import read_image
from vargpt_rl.data.quarantine import Quarantine
from vargpt_rl.data.sources import prompts_from_file
from vargpt_rl.inference.conversation import load
from vargpt_rl.inference.images import DrawingSettings, draw_missing, image_line, make_folder
from vargpt_rl.model.hub import check_model


@dataclass(kw_only=True)
class GenerateConfig(DrawingSettings):
    """What to draw: one ``prompt``, or those of a file (``prompts``: .txt, or .jsonl with key "prompt").

    ``images`` are drawn of each, ``batch_size`` at once. ``image`` is an image for the prompts to edit.
    """

    out: str
    prompt: str | None = None
    prompts: str | None = None
    image: str | None = None
    images: int = 1
    batch_size: int = 8

    def __post_init__(self):
        super().__post_init__()
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("expected either prompt=... or prompts=FILE")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("prompt= is empty")
        for key in ("images", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: expected 1 or more")


def read_prompts(config: GenerateConfig) -> list[str]:
    """The prompts; bad lines of their file are put down in ``quarantine.jsonl``."""
    if config.prompt is not None:
        return [config.prompt]
    quarantine = Quarantine(Path(config.out, "quarantine.jsonl"))
    try:
        prompts = prompts_from_file(Path(config.prompts), quarantine)
    except ValueError as error:
        raise ValueError(f"prompts={error}") from error
    if quarantine.lost:
        print(f"{quarantine.lost} lines of {config.prompts} have no prompt, see {quarantine.path}", file=sys.stderr)
    return [prompt.text for prompt in prompts]


def plan(config: GenerateConfig, folder: str, prompts: list[str]) -> list[dict]:
    """The line of ``images.jsonl`` for every image that is wanted."""
    image = config.image and str(Path(config.image).resolve())
    return [
        image_line(config, f"{i:05d}-{k:02d}.png", prompt, i, k, image) | {"checkpoint": folder}
        for i, prompt in enumerate(prompts)
        for k in range(config.images)
    ]


def generate(config: GenerateConfig) -> None:
    """Draw what is not there yet. ValueError naming the key of whatever is wrong, before the model is loaded."""
    folder, out = check_model(config.checkpoint), make_folder(config.out)
    try:
        image = read_image(Path(config.image)) if config.image else None
    except ValueError as error:
        raise ValueError(f"image={error}") from error
    wanted = plan(config, folder, read_prompts(config))
    made = draw_missing(
        wanted, out, lambda: load(folder, config.device, config.dtype), config.batch_size, look=lambda _: image
    )
    print(f"{made} images made, {len(wanted) - made} were there already: {out.resolve()}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code."""
    return run_command(GenerateConfig, generate, arguments)


if __name__ == "__main__":
    sys.exit(main())
