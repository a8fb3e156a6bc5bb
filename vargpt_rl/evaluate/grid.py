"""Sample grids: the same prompts and seeds, a row for each stage, the winners beside them."""

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL, LABEL, CAPTION = 128, 96, 40  # pixels: an image's side, the row labels' width, the captions' height


def sample_grid(rows: dict[str, list[Path]], captions: list[str], path: Path) -> None:
    """Compose images into one PNG: a column for each caption, a row for each entry of ``rows``, in order."""
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
