"""Sample grids have a column for each prompt and a row for each policy."""

from PIL import Image

from vargpt_rl.evaluate.grid import CAPTION, CELL, LABEL, compose


def test_places_images_by_row_and_column(tmp_path):
    for name, colour in (("a", "red"), ("b", "lime"), ("c", "blue")):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{name}.png")
    a, b, c = (tmp_path / f"{name}.png" for name in "abc")
    compose({"before": [a, b], "after": [c, a]}, ["a circle", "four red crosses on the left"], tmp_path / "grid.png")
    grid = Image.open(tmp_path / "grid.png")
    assert grid.size == (LABEL + 2 * CELL, CAPTION + 2 * CELL)

    def at(row: int, column: int) -> tuple[int, ...]:
        return grid.getpixel((LABEL + column * CELL + CELL // 2, CAPTION + row * CELL + CELL // 2))

    assert [at(0, 0), at(0, 1), at(1, 0), at(1, 1)] == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 0)]
