"""Draw the images of a list of requests into a folder, each once.

The seed of an image follows from the run's seed and the numbers of its prompt and of the image, and the image from
its seed, whatever batch it is drawn in.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from vargpt_rl.inference.conversation import device_and_dtype
from vargpt_rl.model.generate import SamplingConfig, generate_images, to_images
from vargpt_rl.model.hub import TINY
from vargpt_rl.model.prompt import REPLY, ChatTemplate
from vargpt_rl.model.scales import SCHEDULES, STRIDE, full_schedule, size_for
from vargpt_rl.model.unified import Unified
from vargpt_rl.storage.files import write_atomically
from vargpt_rl.storage.lines import as_lines, read_records

RECORDS = "images.jsonl"


def _aspects() -> dict[str, float]:
    ratios = [Fraction(1 / ratio).limit_denominator(9) for ratio in sorted(SCHEDULES)]
    return {f"{ratio.numerator}:{ratio.denominator}": float(ratio) for ratio in ratios}


ASPECTS = _aspects()
"""Width over height of the release's schedules, by name, from wide to tall."""


def image_size(resolution: int, aspect: str) -> tuple[int, int]:
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
        self.size = image_size(self.resolution, self.aspect)
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: expected 0 or more")
        try:
            self.sampling = SamplingConfig(self.cfg, self.tau, self.top_k, self.top_p)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("sampling.")) from error
        device_and_dtype(self.device, self.dtype)


def image_line(
    settings: DrawingSettings, file: str, prompt: str, index: int, number: int, image: str | None = None
) -> dict:
    """The line of ``images.jsonl`` for the image of a prompt that has these numbers; ``image`` is to be edited."""
    return {
        "file": file,
        "prompt": prompt,
        "seed": int(np.random.SeedSequence([settings.seed, index, number]).generate_state(1)[0]),
        "resolution": settings.resolution,
        "size": list(settings.size),
        "sampling": asdict(settings.sampling),
        "image": image,
    }


def check_unchanged(out: Path, name: str, wanted: dict, made: dict) -> None:
    """ValueError where something that is in ``out`` was made with other settings than are wanted now."""
    for key, value in wanted.items():
        if value != made.get(key):
            raise ValueError(
                f"out={out}: {name} was made with {key}={made.get(key)}, now it is {value}: give this run another "
                "out=..."
            )


def drawn_images(path: Path) -> list[dict]:
    """The records of images that are there."""
    return [record for record in read_records(path) if (path.parent / record["file"]).exists()]


def check_images(out: Path, wanted: list[dict]) -> set[str]:
    """The files that need not be drawn again, of all the records in ``out``.

    ValueError where a wanted image was made with other settings.
    """
    records = {record["file"]: record for path in sorted(out.glob("images*.jsonl")) for record in drawn_images(path)}
    for line in wanted:
        now, made = ({**x["sampling"], **x} for x in (line, records.get(line["file"], line)))
        check_unchanged(out, line["file"], now, made)
    return set(records)


def make_folder(out: str) -> Path:
    """The folder that images go to; ValueError where there can be none."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out={out}: {error.strerror}") from error
    return Path(out)


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG: it is there whole or not at all."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def draw_batch(
    model: Unified, chat: ChatTemplate, lines: list[dict], look: Callable[[str], Image.Image] | None
) -> list[Image.Image]:
    """The images of some lines of the plan, all of one size and sampling, all or none with an ``image`` to edit."""
    shown = chat.vision_inputs([look(line["image"]) for line in lines]) if lines[0]["image"] else None
    grids = shown.image_grid_thw.split(1) if shown else [None] * len(lines)
    rows = [chat.drawing_prompt(line["prompt"], REPLY, grid) for line, grid in zip(lines, grids, strict=True)]
    ids_BT = chat.pad(rows, "left").to(model.device)
    mask_BT = chat.pad([[1] * len(row) for row in rows], "left", value=0).to(model.device)
    seen = [tensor.to(model.device) for tensor in shown or ()]
    size, sampling = tuple(lines[0]["size"]), SamplingConfig(**lines[0]["sampling"])
    drawn = generate_images(model, ids_BT, mask_BT, [line["seed"] for line in lines], size, sampling, *seen)
    return to_images(model, drawn.summed_Bdhw)


def batches(lines: list[dict], size: int) -> Iterator[list[dict]]:
    remaining = iter(lines)
    while batch := list(islice(remaining, size)):
        yield batch


def draw_missing(
    wanted: list[dict],
    out: Path,
    model: Callable[[], tuple[Unified, ChatTemplate]],
    batch_size: int,
    look: Callable[[str], Image.Image] | None = None,
    part: slice = slice(None),
    records: str = RECORDS,
) -> int:
    """Draw what ``part`` of the plan is not in ``out`` yet; how many images that were.

    ``model`` is called only where there is something to draw; ``look`` finds the image that a line's ``image`` names.
    Processes that draw different parts at the same time keep ``records`` of their own, "images*.jsonl". ValueError
    where an image was made with other settings.
    """
    there = check_images(out, wanted)
    lines = wanted[part]
    missing = [line for line in lines if line["file"] not in there]
    if not missing:
        return 0
    write_atomically(out / records, as_lines(drawn_images(out / records)).encode())
    loaded = model()
    with (
        (out / records).open("a", encoding="utf-8") as file,
        tqdm(total=len(lines), initial=len(lines) - len(missing), unit="image") as bar,
    ):
        for batch in batches(missing, batch_size):
            for line, image in zip(batch, draw_batch(*loaded, batch, look), strict=True):
                (out / line["file"]).parent.mkdir(parents=True, exist_ok=True)
                save_image(image, out / line["file"])
            file.write(as_lines(batch))
            file.flush()
            bar.update(len(batch))
    return len(missing)
