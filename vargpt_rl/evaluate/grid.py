"""Sample grids: images of the same prompts and seeds, one row per stage and one for the chosen images."""

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL = 128
"""Side of an image in pixels."""
LABEL = 96
"""Width of the row labels in pixels."""
CAPTION = 40
"""Height of the captions in pixels."""


def compose(rows: dict[str, list[Path]], captions: list[str], path: Path) -> None:
    """Compose images into one PNG with a column per caption and a row per entry of ``rows``, in order."""
    grid = Image.new("RGB", (LABEL + CELL * len(captions), CAPTION + CELL * len(rows)), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(size=11)
    for column, caption in enumerate(captions):
        wrapped = "\n".join(textwrap.wrap(caption, 21)[:3])
        pen.multiline_text((LABEL + column * CELL + 3, 2), wrapped, fill="black", font=font, spacing=1)
    for row, (label, files) in enumerate(rows.items()):
        top = CAPTION + row * CELL
        pen.text((4, top + CELL // 2 - 6), label, fill="black", font=font)
        for column, file in enumerate(files):
            with Image.open(file) as image:
                cell = image.convert("RGB").resize((CELL - 4, CELL - 4), Image.Resampling.LANCZOS)
            grid.paste(cell, (LABEL + column * CELL + 2, top + 2))
    grid.save(path)
