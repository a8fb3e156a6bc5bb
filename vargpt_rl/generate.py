"""Draw prompts: ``python -m vargpt_rl.generate prompt="a red circle" out=DIR [key=value ...]``.

Writes PNG files named after the numbers of prompt and picture, and ``pictures.jsonl`` with a line for each. The same
command goes on after the last batch that is recorded; other settings want another folder. Exit codes: 0 done, 1 failed,
2 a setting or an input is wrong.

The seed of a picture follows from ``seed`` and those two numbers, and the picture from its seed, whatever the batch it
is drawn in, up to rounding: a batch of another shape is added up in another order, which in float32 seldom turns a bit
(one picture in dozens at 512 px), in bfloat16 often. With ``batch_size=1`` pictures are the same to the bit.
"""

import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from configs.command import run_command
from configs.schema import TINY
from vargpt_rl.checkpoint import write_atomically
from vargpt_rl.data.lines import as_lines, read_records
from vargpt_rl.data.pictures import read_picture
from vargpt_rl.data.quarantine import Quarantine
from vargpt_rl.data.sources import prompts_from_file
from vargpt_rl.inputs import check_model
from vargpt_rl.model.conversation import device_and_dtype, load
from vargpt_rl.model.generate import SamplingConfig, draw, to_pictures
from vargpt_rl.model.prompt import REPLY, Markup
from vargpt_rl.model.scales import SCHEDULES, STRIDE, full_schedule, size_for
from vargpt_rl.model.unified import Unified

RECORDS = "pictures.jsonl"


def _aspects() -> dict[str, float]:
    ratios = [Fraction(1 / ratio).limit_denominator(9) for ratio in sorted(SCHEDULES)]
    return {f"{ratio.numerator}:{ratio.denominator}": float(ratio) for ratio in ratios}


ASPECTS = _aspects()
"""Width over height of the release's schedules, by name, from wide to tall."""


def picture_size(resolution: int, aspect: str) -> tuple[int, int]:
    """(height, width) in pixels of the release's size at this resolution. ValueError naming the key that is wrong."""
    if resolution <= 0 or resolution % STRIDE:
        raise ValueError(f"resolution={resolution}: expected a positive multiple of {STRIDE}")
    if aspect not in ASPECTS:
        raise ValueError(f"aspect={aspect}: expected one of {', '.join(ASPECTS)} (width:height)")
    if aspect == "1:1":
        return resolution, resolution
    try:
        size = size_for(resolution, ASPECTS[aspect])
    except ValueError as error:
        raise ValueError(f"aspect={aspect}: {error}") from error
    if full_schedule(*size) != full_schedule(1, ASPECTS[aspect]):
        raise ValueError(f"aspect={aspect}: resolution={resolution} is too coarse for it")
    return size


@dataclass(kw_only=True)
class DrawingSettings:
    """Which model draws, and how: the settings that this command and the chat share.

    ``checkpoint`` is "tiny", a model directory or a hub name; ``aspect`` is width:height. ``cfg``, ``tau``, ``top_k``
    and ``top_p`` are those of ``SamplingConfig``. ``device`` auto is a GPU if there is one, ``dtype`` auto bfloat16
    there. ``size`` and ``sampling`` follow from these.
    """

    checkpoint: str = TINY
    resolution: int = 512
    aspect: str = "1:1"
    seed: int = 0
    cfg: float = SamplingConfig.cfg
    tau: float = SamplingConfig.tau
    top_k: int = SamplingConfig.top_k
    top_p: float = SamplingConfig.top_p
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self):
        self.size = picture_size(self.resolution, self.aspect)
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: expected 0 or more")
        try:
            self.sampling = SamplingConfig(self.cfg, self.tau, self.top_k, self.top_p)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("sampling.")) from error
        device_and_dtype(self.device, self.dtype)


@dataclass(kw_only=True)
class GenerateConfig(DrawingSettings):
    """What to draw: one ``prompt``, or those of a file (``prompts``: .txt, or .jsonl with key "prompt").

    ``pictures`` are drawn of each, ``batch_size`` at once. ``image`` is a picture for the prompts to edit.
    """

    out: str
    prompt: str | None = None
    prompts: str | None = None
    image: str | None = None
    pictures: int = 1
    batch_size: int = 8

    def __post_init__(self):
        super().__post_init__()
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("expected either prompt=... or prompts=FILE")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("prompt= is empty")
        for key in ("pictures", "batch_size"):
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


def picture_line(
    settings: DrawingSettings, file: str, prompt: str, index: int, number: int, image: str | None = None
) -> dict:
    """The line of ``pictures.jsonl`` for the picture of a prompt that has these numbers; ``image`` is to be edited."""
    return {
        "file": file,
        "prompt": prompt,
        "seed": int(np.random.SeedSequence([settings.seed, index, number]).generate_state(1)[0]),
        "resolution": settings.resolution,
        "size": list(settings.size),
        "sampling": asdict(settings.sampling),
        "image": image,
    }


def plan(config: GenerateConfig, folder: str, prompts: list[str]) -> list[dict]:
    """The line of ``pictures.jsonl`` for every picture that is wanted."""
    image = config.image and str(Path(config.image).resolve())
    return [
        picture_line(config, f"{i:05d}-{k:02d}.png", prompt, i, k, image) | {"checkpoint": folder}
        for i, prompt in enumerate(prompts)
        for k in range(config.pictures)
    ]


def check_unchanged(out: Path, name: str, wanted: dict, made: dict) -> None:
    """ValueError where something that is in ``out`` was made with other settings than are wanted now."""
    for key, value in wanted.items():
        if value != made.get(key):
            raise ValueError(
                f"out={out}: {name} was made with {key}={made.get(key)}, now it is {value}: give this run another "
                "out=..."
            )


def drawn_pictures(path: Path) -> list[dict]:
    """The records of pictures that are there."""
    return [record for record in read_records(path) if (path.parent / record["file"]).exists()]


def check_pictures(out: Path, wanted: list[dict]) -> set[str]:
    """The files that need not be drawn again, of all the records in ``out``.

    ValueError where a wanted picture was made with other settings.
    """
    records = {
        record["file"]: record for path in sorted(out.glob("pictures*.jsonl")) for record in drawn_pictures(path)
    }
    for line in wanted:
        now, made = ({**x["sampling"], **x} for x in (line, records.get(line["file"], line)))
        check_unchanged(out, line["file"], now, made)
    return set(records)


def make_folder(out: str) -> Path:
    """The folder that pictures go to; ValueError where there can be none."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out={out}: {error.strerror}") from error
    return Path(out)


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a PNG: it is there whole or not at all."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def draw_batch(
    model: Unified, chat: Markup, lines: list[dict], look: Callable[[str], Image.Image] | None
) -> list[Image.Image]:
    """The pictures of some lines of the plan, all of one size and sampling, all or none with an ``image`` to edit."""
    shown = chat.pictures([look(line["image"]) for line in lines]) if lines[0]["image"] else None
    grids = shown.image_grid_thw.split(1) if shown else [None] * len(lines)
    rows = [chat.drawing_prompt(line["prompt"], REPLY, grid) for line, grid in zip(lines, grids, strict=True)]
    ids_BT = chat.pad(rows, "left").to(model.device)
    mask_BT = chat.pad([[1] * len(row) for row in rows], "left", value=0).to(model.device)
    seen = [tensor.to(model.device) for tensor in shown or ()]
    size, sampling = tuple(lines[0]["size"]), SamplingConfig(**lines[0]["sampling"])
    drawn = draw(model, ids_BT, mask_BT, [line["seed"] for line in lines], size, sampling, *seen)
    return to_pictures(model, drawn.summed_Bdhw)


def batches(lines: list[dict], size: int) -> Iterator[list[dict]]:
    remaining = iter(lines)
    while batch := list(islice(remaining, size)):
        yield batch


def draw_missing(
    wanted: list[dict],
    out: Path,
    model: Callable[[], tuple[Unified, Markup]],
    batch_size: int,
    look: Callable[[str], Image.Image] | None = None,
    part: slice = slice(None),
    records: str = RECORDS,
) -> int:
    """Draw what ``part`` of the plan is not in ``out`` yet; how many pictures that were.

    ``model`` is called only where there is something to draw; ``look`` finds the picture that a line's ``image`` names.
    Processes that draw different parts at the same time keep ``records`` of their own, "pictures*.jsonl". ValueError
    where a picture was made with other settings.
    """
    there = check_pictures(out, wanted)
    lines = wanted[part]
    missing = [line for line in lines if line["file"] not in there]
    if not missing:
        return 0
    write_atomically(out / records, as_lines(drawn_pictures(out / records)).encode())
    loaded = model()
    with (
        (out / records).open("a", encoding="utf-8") as file,
        tqdm(total=len(lines), initial=len(lines) - len(missing), unit="picture") as bar,
    ):
        for batch in batches(missing, batch_size):
            for line, picture in zip(batch, draw_batch(*loaded, batch, look), strict=True):
                (out / line["file"]).parent.mkdir(parents=True, exist_ok=True)
                save_picture(picture, out / line["file"])
            file.write(as_lines(batch))
            file.flush()
            bar.update(len(batch))
    return len(missing)


def generate(config: GenerateConfig) -> None:
    """Draw what is not there yet. ValueError naming the key of whatever is wrong, before the model is loaded."""
    folder, out = check_model(config.checkpoint), make_folder(config.out)
    try:
        image = read_picture(Path(config.image)) if config.image else None
    except ValueError as error:
        raise ValueError(f"image={error}") from error
    wanted = plan(config, folder, read_prompts(config))
    made = draw_missing(
        wanted, out, lambda: load(folder, config.device, config.dtype), config.batch_size, look=lambda _: image
    )
    print(f"{made} pictures made, {len(wanted) - made} were there already: {out.resolve()}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code."""
    return run_command(GenerateConfig, generate, arguments)


if __name__ == "__main__":
    sys.exit(main())
