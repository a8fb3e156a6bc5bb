"""DPG-Bench: grids for the scorer, its results file, and missing files."""

import os
import re

import pandas as pd
import pytest
from PIL import Image

from tests.evaluate.conftest import colour
from vargpt_rl.evaluate.dpg import SAMPLES, read_results

ITEMS = {"diffusiondb0": "a red fox", "1": "a cow on a hill, at dusk", "partiprompts7": "two cats"}
SIDE = 64


@pytest.fixture
def bench(tmp_path):
    """The benchmark's folder."""
    folder = tmp_path / "dpg_bench"
    (folder / "prompts").mkdir(parents=True)
    for item, prompt in ITEMS.items():
        (folder / f"prompts/{item}.txt").write_text(prompt)
    rows = [(item, f"{prompt}, with a comma", question) for item, prompt in ITEMS.items() for question in (1, 2)]
    table = pd.DataFrame(rows, columns=["item_id", "text", "proposition_id"])
    table.to_csv(folder / "dpg_bench.csv", index=False)
    return folder


def scores_of(item: str) -> list[float]:
    return [(len(item) % 4 + k) / 8 for k in range(SAMPLES)]


def scorer(images, outfile) -> list[tuple[str, list[Image.Image]]]:
    """Reads every file of the folder, cuts it as the benchmark's scorer does, and writes a text file as it does."""
    cut, lines, means = [], [], []
    boxes = [(0, 0), (SIDE, 0), (0, SIDE), (SIDE, SIDE)]
    for name in os.listdir(images):
        grid = Image.open(images / name)
        item = name.split(".")[0]
        cut.append((item, [grid.crop((x, y, x + SIDE, y + SIDE)) for x, y in boxes]))
        scores = scores_of(item)
        means.append(sum(scores) / len(scores))
        lines.append(", ".join([str(images / name), *map(str, scores), str(means[-1])]))
    lines += ["Model: images", "L1 category scores:", "\tentity: 75.5", "\tother: 50.0", "L2 category scores:",
              "\tentity - whole: 80.25", "\tother - count: 50.0", f"Image path: {images}",
              f"Save results to: {outfile}", f"DPG-Bench score: {sum(means) / len(means) * 100}"]  # fmt: skip
    outfile.write_text("\n".join(lines) + "\n")
    return cut


def test_writes_grids_and_reads_the_scorers_results(command, bench, painted, folder, result, capsys):
    assert command("benchmark=dpg", f"prompts={bench}") == 2
    where = folder("dpg")
    said = capsys.readouterr().err
    assert (
        f"--image-root-path {where / 'images'} --resolution {SIDE} --pic-num 4 --csv {bench / 'dpg_bench.csv'}" in said
    )
    cut = scorer(where / "images", where / "dpg_results.txt")
    assert {item for item, _ in cut} == set(ITEMS)
    for item, images in cut:
        seeds = [line["seed"] for line in painted if line["prompt"] == ITEMS[item]]
        assert [image.getcolors() for image in images] == [[(SIDE * SIDE, colour(seed))] for seed in seeds]

    grids = {path: path.stat().st_mtime_ns for path in (where / "images").iterdir()}
    assert command("benchmark=dpg", f"prompts={bench}") == 0
    assert {path: path.stat().st_mtime_ns for path in (where / "images").iterdir()} == grids
    expected = 100 * sum(sum(scores_of(item)) / SAMPLES for item in ITEMS) / len(ITEMS)
    assert result("dpg")["metrics"] == pytest.approx({"entity": 75.5, "other": 50.0, "overall": expected})
    assert result("dpg")["details"] == {"entity - whole": 80.25, "other - count": 50.0}
    assert result("dpg")["counts"] == {"items": 3, "unscored": 0, "bad_prompts": 0}


def test_updates_the_grid_of_a_new_image(command, bench, painted, folder):
    command("benchmark=dpg", f"prompts={bench}")
    where = folder("dpg")
    Image.new("RGB", (SIDE, SIDE), "black").save(where / "samples/1-3.png")
    command("benchmark=dpg", f"prompts={bench}")
    assert Image.open(where / "images/1.png").getpixel((SIDE, SIDE)) == (0, 0, 0)


def test_missing_files_fail(command, bench, painted, capsys, tmp_path):
    (bench / "prompts/1.txt").unlink()
    assert command("benchmark=dpg", f"prompts={bench}") == 2
    assert f"has 3 items, 1 of them without a prompt, for example {bench / 'prompts/1.txt'}" in capsys.readouterr().err
    (bench / "dpg_bench.csv").unlink()
    assert command("benchmark=dpg", f"prompts={bench}") == 2
    assert f"{bench / 'dpg_bench.csv'} is not DPG-Bench's table of questions" in capsys.readouterr().err
    (bench / "dpg_bench.csv").write_text("a,b\n1,2\n")
    assert command("benchmark=dpg", f"prompts={bench}") == 2
    assert "is not DPG-Bench's table of questions" in capsys.readouterr().err
    assert command("benchmark=dpg", f"prompts={tmp_path}") == 2
    assert (
        f"error: prompts={tmp_path}: expected DPG-Bench's folder, found no {tmp_path / 'prompts'}/*.txt"
        in capsys.readouterr().err
    )
    assert not painted


def test_quarantines_bad_prompts(command, bench, painted, tmp_path, capsys):
    (bench / "prompts/1.txt").write_text(" \n")
    (bench / "prompts/stranger.txt").write_text("a dog")
    assert command("benchmark=dpg", f"prompts={bench}") == 2
    assert "2 of 4 records are bad" in capsys.readouterr().err and not painted
    command("benchmark=dpg", f"prompts={bench}", "max_bad_fraction=0.5")
    assert {line["prompt"] for line in painted} == {"a red fox", "two cats"}
    assert len((tmp_path / "out/dpg/quarantine.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.partition("Model:")[0], "expected one DPG-Bench score at the end"),
        (lambda text: text.replace("DPG-Bench score: ", "DPG-Bench score: 1"), "states a score of 1"),
        (lambda text: text.partition("\n")[2], "states a score of"),
        (lambda text: re.sub(r", 0\.\d+\n", ", nan\n", text), "has a mean of nan, expected 0 to 1"),
        (lambda text: "Failed\n" + text, "expected an item's path with 4 scores and their mean, got 'Failed'"),
    ],
)
def test_rejects_bad_results(command, bench, painted, folder, capsys, change, said):
    command("benchmark=dpg", f"prompts={bench}")
    where = folder("dpg")
    scorer(where / "images", where / "dpg_results.txt")
    text = (where / "dpg_results.txt").read_text()
    assert read_results(text)[0].counts == {"items": 3}
    (where / "dpg_results.txt").write_text(change(text))
    capsys.readouterr()
    assert command("benchmark=dpg", f"prompts={bench}") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert said in message and "run DPG-Bench's scorer" in message


def test_counts_unscored_items(command, bench, painted, folder, capsys, result):
    command("benchmark=dpg", f"prompts={bench}")
    where = folder("dpg")
    (where / "images/1.png").rename(where / "away.png")
    scorer(where / "images", where / "dpg_results.txt")
    capsys.readouterr()
    assert command("benchmark=dpg", f"prompts={bench}") == 2
    assert "got 2 items, 2 of the 3 expected: run DPG-Bench's scorer" in capsys.readouterr().err
    assert command("benchmark=dpg", f"prompts={bench}", "max_bad_fraction=0.4") == 0
    assert result("dpg")["counts"]["unscored"] == 1


def test_rejects_images_that_are_not_square(command, bench, painted, capsys):
    assert command("benchmark=dpg", f"prompts={bench}", "resolution=128", "aspect=4:3") == 2
    assert "error: aspect=4:3: benchmark=dpg needs square images" in capsys.readouterr().err
