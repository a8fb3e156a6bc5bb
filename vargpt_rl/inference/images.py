"""Generate the images of a list of requests into a folder, each once.

The seed of an image depends on the run's seed and the numbers of its prompt and of the image; the image depends on its
seed, not on its batch.

Shape legend: B images, T prompt positions, d latent channels, h w latent grid.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from PIL import Image

from vargpt_rl.common.bars import progress_bar
from vargpt_rl.common.settings import Between, Count, CountOrNone, NotNegative, Positive
from vargpt_rl.inference.conversation import device_and_dtype
from vargpt_rl.model.drawing_defaults import DrawingDefaults, read_defaults
from vargpt_rl.model.generate import SamplingConfig, generate_images, to_images
from vargpt_rl.model.hub import TINY, check_model
from vargpt_rl.model.prompt import REPLY, ChatTemplate
from vargpt_rl.model.scales import SCHEDULES, STRIDE, full_schedule, size_for
from vargpt_rl.model.unified import Unified
from vargpt_rl.storage.files import write_atomically
from vargpt_rl.storage.lines import as_lines, read_records

RECORDS = "images.jsonl"

Look = Callable[[str], Image.Image]
"""Load the image of a name; ValueError if it cannot be read."""


def _aspects() -> dict[str, float]:
    ratios = [Fraction(1 / ratio).limit_denominator(9) for ratio in sorted(SCHEDULES)]
    return {f"{ratio.numerator}:{ratio.denominator}": float(ratio) for ratio in ratios}


ASPECTS = _aspects()
"""Name to width over height of the release's schedules, from wide to tall."""


def image_size(resolution: int, aspect: str) -> tuple[int, int]:
    """Return the release's (height, width) in pixels at this resolution. Raises ValueError naming the wrong key."""
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
    """Model and sampling: the settings that ``generate``, ``chat`` and ``evaluate`` share.

    ``size``, ``sampling`` and ``defaults`` are derived from them. What is null is taken from the checkpoint
    (`vargpt_rl.model.drawing_defaults`), or is the published code's value if the checkpoint does not say.
    """

    fallback: ClassVar[int] = 512
    """Resolution for a checkpoint that does not say."""

    checkpoint: str = TINY
    """"tiny", a model directory or a hub name."""
    resolution: Count | None = None
    """Side in pixels of a square image; other aspect ratios have about as many pixels; null is the checkpoint's."""
    aspect: str = "1:1"
    """width:height."""
    seed: CountOrNone = 0
    """Seed of the images."""
    cfg: NotNegative | None = None
    """Guidance strength; null is the checkpoint's, like the next three."""
    tau: Positive | None = None
    """Temperature of the logits."""
    top_k: Count | None = None
    """Sample among so many most likely values; 1 is greedy."""
    top_p: Annotated[float, Between(0, 1, includes_low=False)] | None = None
    """Sample among the most likely values that together reach this probability."""
    device: str = "auto"
    """auto is a GPU if there is one."""
    dtype: str = "auto"
    """auto, fp32 or bf16; auto is bf16 on a GPU and fp32 on a CPU."""

    def __post_init__(self):
        self.defaults = read_defaults(check_model(self.drawing_checkpoint))
        self.resolution = self.resolution or self.defaults.resolution or self.fallback
        self.size = image_size(self.resolution, self.aspect)
        self.sampling = sampling_of(self, self.defaults)
        device_and_dtype(self.device, self.dtype)

    @property
    def drawing_checkpoint(self) -> str:
        """The checkpoint whose defaults are taken."""
        return self.checkpoint


def sampling_of(given: DrawingSettings, defaults: DrawingDefaults) -> SamplingConfig:
    """Return the sampling that is given, else the checkpoint's, else the published code's."""
    names = [field.name for field in fields(SamplingConfig)]
    known = {name: value for name in names if (value := getattr(defaults, name)) is not None}
    own = {name: value for name in names if (value := getattr(given, name)) is not None}
    return SamplingConfig(**known | own)


def image_line(
    settings: DrawingSettings, file: str, prompt: str, index: int, number: int, image: str | None = None
) -> dict:
    """Make the line of ``images.jsonl`` for image ``number`` of prompt ``index``; ``image`` is the one to edit."""
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
    """Raise ValueError if a result in ``out`` was made with other settings than those wanted now."""
    for key, value in wanted.items():
        if value != made.get(key):
            raise ValueError(
                f"out={out}: {name} was made with {key}={made.get(key)}, now it is {value}: give this run another "
                "out=..."
            )


def drawn_images(path: Path) -> list[dict]:
    """Read the records whose images exist."""
    return [record for record in read_records(path) if (path.parent / record["file"]).exists()]


def check_images(out: Path, wanted: list[dict]) -> set[str]:
    """Return the files recorded in ``out`` that exist already.

    Raises ValueError if a wanted image was made with other settings.
    """
    records = {record["file"]: record for path in sorted(out.glob("images*.jsonl")) for record in drawn_images(path)}
    for line in wanted:
        now, made = ({**x["sampling"], **x} for x in (line, records.get(line["file"], line)))
        check_unchanged(out, line["file"], now, made)
    return set(records)


def make_folder(out: str) -> Path:
    """Create the output folder. Raises ValueError if that is impossible."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out={out}: {error.strerror}") from error
    return Path(out)


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def draw_batch(model: Unified, chat: ChatTemplate, lines: list[dict], look: Look | None) -> list[Image.Image]:
    """Draw the images of some lines, all of one size and sampling, and all or none with an ``image`` to edit."""
    shown = None
    if lines[0]["image"]:
        assert look is not None, f"{lines[0]['file']}: lines with an image to edit need a function that loads it"
        shown = chat.vision_inputs([look(line["image"]) for line in lines])
    grids = shown.image_grid_thw.split(1) if shown else [None] * len(lines)
    rows = [chat.drawing_prompt(line["prompt"], REPLY, grid) for line, grid in zip(lines, grids, strict=True)]
    ids_BT = chat.pad(rows, "left").to(model.device)
    mask_BT = chat.pad([[1] * len(row) for row in rows], "left", value=0).to(model.device)
    seen = {name: tensor.to(model.device) for name, tensor in (shown._asdict() if shown else {}).items()}
    size, sampling = tuple(lines[0]["size"]), SamplingConfig(**lines[0]["sampling"])
    drawn = generate_images(model, ids_BT, mask_BT, [line["seed"] for line in lines], size, sampling, **seen)
    return to_images(model, drawn.summed_Bdhw)


def batches(lines: list[dict], size: int) -> Iterator[list[dict]]:
    """Split lines into batches of at most ``size``."""
    remaining = iter(lines)
    while batch := list(islice(remaining, size)):
        yield batch


def draw_missing(
    wanted: list[dict],
    out: Path,
    model: Callable[[], tuple[Unified, ChatTemplate]],
    batch_size: int,
    look: Look | None = None,
    part: slice = slice(None),
    records: str = RECORDS,
) -> int:
    """Draw the images of ``part`` that are not in ``out`` yet; return their number.

    ``model`` is called only if there is something to draw; ``look`` loads the image that a line's ``image`` names.
    Processes that draw different parts at the same time need different ``records``, named "images*.jsonl". Raises
    ValueError if an image was made with other settings.
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
        progress_bar(name=out.name, total=len(lines), initial=len(lines) - len(missing), unit="image") as bar,
    ):
        for batch in batches(missing, batch_size):
            for line, image in zip(batch, draw_batch(*loaded, batch, look), strict=True):
                (out / line["file"]).parent.mkdir(parents=True, exist_ok=True)
                save_image(image, out / line["file"])
            file.write(as_lines(batch))
            file.flush()
            bar.update(len(batch))
    return len(missing)
