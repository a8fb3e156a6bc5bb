import csv
import json
import os
import pickle
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vargpt_rl.data.captioned import CaptionedConfig, CaptionedSource
from vargpt_rl.data.quarantine import Quarantine
from vargpt_rl.data.records import formats
from vargpt_rl.data.samples import Prompt
from vargpt_rl.model.prompt import REPLY

SHARED = Path(os.environ.get("VARGPT_SHARED", Path(__file__).resolve().parents[2] / "../shared"))


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.mode == b.mode == "RGB" and np.array_equal(np.asarray(a), np.asarray(b))


def noise(*size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size, np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Ten good captions, and one of each fault."""
    for name in ("images/sub", "winners/sub"):
        (tmp_path / name).mkdir(parents=True)
    lines = []
    for index in range(10):
        file = f"sub/{index}.png" if index == 3 else f"{index}.png"
        Image.fromarray(noise(20, 30, 4)).save(tmp_path / "images" / file)
        Image.fromarray(noise(20, 30, 4)).save(tmp_path / "winners" / file)
        lines.append(json.dumps({"id": f"p{index}", "file": file, "caption": f"thing {index}"}))
    (tmp_path / "winners" / "9.png").unlink()
    lines += [
        '{"id": "bad json", ',
        "",
        '{"id": "no file", "caption": "a"}',
        '{"id": 7.5, "caption": "a", "file": "0.png"}',
        '{"id": "empty", "caption": " ", "file": "0.png"}',
        '{"id": "half", "caption": "\\ud83d", "file": "0.png"}',
        '["a list"]',
        '{"id": "missing", "caption": "a", "file": "missing.png"}',
        '{"id": "up", "caption": "a", "file": "../secret.png"}',
        f'{{"id": "absolute", "caption": "a", "file": "{tmp_path}/secret.png"}}',
        '{"id": "p0", "caption": "again", "file": "1.png"}',
        '{"id": "long", "caption": "a", "file": "' + "x" * 5000 + '"}',
    ]
    (tmp_path / "captions.jsonl").write_bytes("\r\n".join(lines).encode() + b"\n\xff\xfe\n")
    for name in ("secret.png", "images/orphan.PNG", "winners/orphan.png"):
        Image.fromarray(noise(8, 8, 3)).save(tmp_path / name)
    (tmp_path / "images" / "README.md").write_text("not an image")
    return tmp_path


def captioned(folder: Path, **settings) -> tuple[CaptionedSource, Quarantine]:
    names = {name: str(folder / path) for name, path in
             (("captions", "captions.jsonl"), ("images", "images"), ("winners", "winners"))}  # fmt: skip
    quarantine = Quarantine(folder / "quarantine.jsonl")
    return CaptionedSource(CaptionedConfig(**(names | settings)), quarantine), quarantine


def test_every_fault_is_quarantined_with_its_line_and_reason(folder):
    source, quarantine = captioned(folder)
    found = [json.loads(line) for line in quarantine.path.read_text().splitlines()]
    by_place = [(Path(item["source"]).name, item["reason"], item["lost"]) for item in found]
    assert by_place == [
        ("captions.jsonl:10", "caption without a winner", False),
        ("captions.jsonl:11", "not JSON: Expecting property name enclosed in double quotes", True),
        ("captions.jsonl:13", '"file" is missing', True),
        ("captions.jsonl:14", '"id" is of type float, expected str', True),
        ("captions.jsonl:15", '"caption" is empty', True),
        ("captions.jsonl:16", '"caption" has characters that are no text', True),
        ("captions.jsonl:17", "list where an object is expected", True),
        ("captions.jsonl:18", "caption without an image", True),
        ("captions.jsonl:19", '"file" leaves the image folder', True),
        ("captions.jsonl:20", '"file" leaves the image folder', True),
        ("captions.jsonl:21", '"id" is that of an earlier line', True),
        ("captions.jsonl:22", "caption without an image", True),
        ("captions.jsonl:23", "not UTF-8", True),
        ("orphan.PNG", "image without a caption", False),
        ("orphan.png", "winner without a prompt", False),
    ]
    assert source.lines == 22
    quarantine.check(source.lines, 0.6)
    with pytest.raises(ValueError, match="12 of 22 records are bad"):
        quarantine.check(source.lines, 0.5)


def test_splits_are_disjoint_stable_and_complete(folder):
    source, _ = captioned(folder, held_out_fraction=0.3)
    train, held_out = ({p.id for p in source.prompts(split, 100, 0)} for split in ("train", "held_out"))
    assert train | held_out == {f"p{index}" for index in range(10)}
    assert train and held_out and not train & held_out
    assert {record.id for record in source.records(100, 1)} == train
    again, _ = captioned(folder, held_out_fraction=0.3)
    assert again.prompts("held_out", 2, 5) == source.prompts("held_out", 2, 5) == source.prompts("held_out", 9, 5)[:2]
    with pytest.raises(ValueError, match="unknown split 'test'"):
        source.prompts("test", 1, 0)
    everything, _ = captioned(folder, held_out_fraction=0.0)
    with pytest.raises(ValueError, match="captions.jsonl: no held_out captions"):
        everything.prompts("held_out", 1, 0)


def test_records_are_distinct_then_repeat(folder):
    source, _ = captioned(folder, held_out_fraction=0.0)
    ids = [record.id for record in source.records(25, 0)]
    assert len(set(ids[:10])) == 10
    assert ids[10:20] == ids[:10] and ids[20:] == ids[:5]
    assert ids != [record.id for record in source.records(25, 1)]


def test_every_key_loads_in_another_process_and_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    config = CaptionedConfig("captions.jsonl", "images", "winners", held_out_fraction=0.0)
    source = CaptionedSource(config, Quarantine(Path("quarantine.jsonl")))
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    source = pickle.loads(pickle.dumps(source))
    for record in source.records(10, 0):
        assert source.load(record.image, 16).size == (16, 16)
        key = source.winner_key(record.prompt)
        assert (key is None) == (record.id == "p9")
        assert key is None or source.load(key, 16).size == (16, 16)
    assert source.winner_key(Prompt("unknown", "thing 1")) is None


def test_without_winners_the_own_image_is_what_samples_are_compared_with(folder):
    config = CaptionedConfig(str(folder / "captions.jsonl"), str(folder / "images"), held_out_fraction=0.0)
    source = CaptionedSource(config, Quarantine(folder / "quarantine.jsonl"))
    assert all(source.winner_key(record.prompt) == record.image for record in source.records(10, 0))
    assert source.winner_key(Prompt("unknown", "thing 1")) is None


def saved(folder: Path, image: Image.Image, name: str = "odd.png", **options) -> str:
    image.save(folder / "images" / name, **options)
    return f"images/{name}"


def test_alpha_is_laid_on_the_background(folder):
    source, _ = captioned(folder, background=[10, 20, 30])
    clear = saved(folder, Image.new("RGBA", (9, 9), (200, 100, 50, 0)))
    assert source.load(clear, 4).getpixel((1, 1)) == (10, 20, 30)
    palette = Image.new("P", (9, 9), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert source.load(saved(folder, palette, transparency=1), 4).getpixel((1, 1)) == (10, 20, 30)
    assert source.load(saved(folder, Image.new("LA", (9, 9), (255, 255))), 4).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGB"])
def test_other_modes_become_rgb(folder, mode):
    source, _ = captioned(folder)
    key = saved(folder, Image.fromarray(noise(9, 9, 3)).convert(mode), "odd.tif")
    assert source.load(key, 4).mode == "RGB"


def test_sixteen_bit_greys_keep_their_brightness(folder):
    source, _ = captioned(folder)
    key = saved(folder, Image.fromarray(np.full((9, 9), 0x8123, np.uint16)))
    assert source.load(key, 4).getpixel((1, 1)) == (0x81,) * 3


def test_the_middle_is_kept_and_the_shorter_side_fills_the_image(folder):
    source, _ = captioned(folder)
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    for image in (pixels, pixels.swapaxes(0, 1)):
        assert np.asarray(source.load(saved(folder, Image.fromarray(image)), 10))[1:-1, 1:-1].min() > 250


def test_photographs_are_turned_upright(folder):
    source, _ = captioned(folder)
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[:, :10] = 255
    photograph = Image.fromarray(pixels)
    photograph.getexif()[0x0112] = 6  # to be turned by a quarter, which brings the left side to the top
    image = np.asarray(source.load(saved(folder, photograph, "odd.png", exif=photograph.getexif()), 10))
    assert image[:4].min() > 250 and image[6:].max() < 5


def test_unreadable_images_are_named(folder):
    source, _ = captioned(folder, max_pixels=900)
    whole = (folder / "images" / "0.png").read_bytes()
    (folder / "images" / "0.png").write_bytes(whole[: len(whole) // 2])
    (folder / "images" / "1.png").write_bytes(b"")
    (folder / "images" / "2.png").unlink()
    Image.new("RGB", (31, 31)).save(folder / "images" / "4.png")
    for file, said in (
        ("0", "truncated"),
        ("1", "empty file"),
        ("2", "No such file"),
        ("4", "more than 900 pixels"),
    ):
        with pytest.raises(ValueError, match=rf"images/{file}.png: not a readable image: .*{said}"):
            source.load(f"images/{file}.png", 16)
    with pytest.raises(ValueError, match="image key 'other/1.png': expected"):
        source.load("other/1.png", 16)


def test_missing_or_empty_input_is_named(folder):
    for name in ("captions", "images", "winners"):
        with pytest.raises(ValueError, match="nowhere: no such"):
            captioned(folder, **{name: str(folder / "nowhere")})
    (folder / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty.jsonl: no usable caption in 0 lines"):
        captioned(folder, captions=str(folder / "empty.jsonl"))
    with pytest.raises(ValueError, match="no usable caption in 22 lines\n(.|\n)*is missing"):
        captioned(folder, caption_field="text")
    with pytest.raises(ValueError, match="held_out_fraction is 1.0"):
        captioned(folder, held_out_fraction=1.0)


@settings(max_examples=60)
@given(st.lists(st.one_of(st.binary(max_size=40), st.text(max_size=20).map(lambda text: json.dumps(
    {"id": text, "caption": "a", "file": text}).encode())), max_size=6))  # fmt: skip
def test_no_line_is_lost_in_silence(lines):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in ("images", "winners"):
            (folder / kind).mkdir()
            Image.new("RGB", (2, 2)).save(folder / kind / "good.png")
        good = json.dumps({"id": "the good one", "caption": "a", "file": "good.png"}).encode()
        written = [line.replace(b"\n", b"").strip() for line in lines]
        (folder / "captions.jsonl").write_bytes(b"\n".join([good, *written]))
        source, quarantine = captioned(folder, held_out_fraction=0.0)
        assert source.lines == 1 + sum(bool(line) for line in written) == 1 + quarantine.lost


@pytest.mark.skipif(not (SHARED / "data/emoji").is_dir(), reason=f"no emoji images at {SHARED / 'data/emoji'}")
def test_real_images(tmp_path):
    emoji = SHARED / "data/emoji"
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    config = CaptionedConfig(str(emoji / "captions.jsonl"), str(emoji / "noto"), str(emoji / "twemoji"))
    source = CaptionedSource(config, quarantine)
    assert source.lines == 723 and not quarantine.counts
    train, held_out = (source.prompts(split, 1000, 0) for split in ("train", "held_out"))
    assert len(train) + len(held_out) == 723 and 50 < len(held_out) < 95
    for record in source.records(20, 0):
        image, winner = source.load(record.image, 64), source.load(source.winner_key(record.prompt), 64)
        assert image.size == winner.size == (64, 64) and not same(image, winner)
        assert image.getpixel((0, 0)) == (255, 255, 255)


def write_set(folder: Path, files: list[str], winners: list[str], rows: list[dict] | None = None) -> None:
    for kind, names in (("images", files), ("winners", winners)):
        (folder / kind).mkdir(exist_ok=True)
        for name in names:
            (folder / kind / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise(8, 8, 3)).save(folder / kind / name)
    rows = rows or [{"id": f"p{n}", "caption": f"thing {n}", "file": name} for n, name in enumerate(files)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


NFC = [unicodedata.normalize("NFC", f"caf\u00e9-{n}.png") for n in range(3)]
NFD = [unicodedata.normalize("NFD", name) for name in NFC]


@pytest.mark.parametrize(
    ("written", "images", "winners"),
    [
        (["a.jpg", "b.jpg"], ["a.jpg", "b.jpg"], ["a.png", "b.webp"]),
        (["a.jpg", "b.jpg"], ["a.JPG", "B.jpg"], ["A.PNG", "b.Jpg"]),
        (NFC, NFD, NFD),
        (NFD, NFC, NFC),
        (NFC, NFC, [name.replace(".png", ".JPEG") for name in NFD]),
        (["sub\\a.png"], ["sub/a.png"], ["sub/a.jpg"]),
        (["v1.0.a.png"], ["v1.0.a.png"], ["v1.0.a.jpg"]),
    ],
)
def test_images_and_winners_are_found_under_names_that_differ_a_little(tmp_path, written, images, winners):
    rows = [{"id": f"p{n}", "caption": "a", "file": name} for n, name in enumerate(written)]
    write_set(tmp_path, images, winners, rows)
    source, quarantine = captioned(tmp_path, held_out_fraction=0.0)
    assert not quarantine.counts
    for record in source.records(len(written), 0):
        assert source.load(record.image, 8).size == (8, 8)
        assert source.load(source.winner_key(record.prompt), 8).size == (8, 8)


def test_a_name_that_fits_several_images_is_not_guessed(tmp_path):
    write_set(tmp_path, ["a.png", "A.PNG", "b.png"], ["b.png", "b.jpg", "B.PNG"])
    rows = [{"id": "one", "caption": "a", "file": "a.PNG"}, {"id": "two", "caption": "b", "file": "b.gif"},
            {"id": "three", "caption": "b", "file": "b.png"}]  # fmt: skip
    write_set(tmp_path, [], [], rows)
    _, quarantine = captioned(tmp_path, held_out_fraction=0.0)
    assert quarantine.counts["image's name differs from several in letter case"] == 1
    assert quarantine.counts["caption without an image"] == 1


def test_several_winners_are_said(tmp_path):
    write_set(tmp_path, ["a.tif"], ["a.png", "a.jpg"])
    source, quarantine = captioned(tmp_path, held_out_fraction=0.0)
    assert source.winner_key(Prompt("p0", "")) == "winners/a.jpg"
    assert quarantine.counts["several winners, of which the first is taken"] == 1 and quarantine.lost == 0


@pytest.mark.parametrize("ending", ["csv", "jsonl", "json", "parquet", "CSV", "txt"])
@pytest.mark.parametrize("ids", [str, int, float])
def test_captions_are_read_from_tables_of_many_kinds(tmp_path, ending, ids):
    write_set(tmp_path, ["0.png", "1.png"], ["0.png", "1.png"])
    rows = [{"id": ids(n), "caption": f'thing "{n}", \u00e9', "file": f"{n}.png"} for n in range(2)]
    path = tmp_path / f"table.{ending}"
    if ending.lower() == "csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows)))
    source, quarantine = captioned(tmp_path, captions=str(path), held_out_fraction=0.0)
    assert {p.id: p.text for p in source.prompts("train", 9, 0)} == {
        # text in CSV stays as it is written
        str(row["id"] if ending.lower() == "csv" else int(row["id"])): row["caption"]
        for row in rows
    }
    assert source.lines == 2 and not quarantine.counts


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("ending", ["csv", "tsv"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("line", ["\n", "\r\n", "\r"])
def test_delimiters_of_csv_are_told_by_the_header(tmp_path, delimiter, ending, quoting, line):
    write_set(tmp_path, ["0.png", "1.png"], ["0.png", "1.png"])
    rows = [{"id": f"p{n}", "caption": f"one, two; {n} | three", "file": f"{n}.png"} for n in range(2)]
    path = tmp_path / f"table.{ending}"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter, quoting=quoting, lineterminator=line)
        writer.writeheader()
        writer.writerows(rows)
    source, quarantine = captioned(tmp_path, captions=str(path), held_out_fraction=0.0)
    assert {p.id: p.text for p in source.prompts("train", 9, 0)} == {row["id"]: row["caption"] for row in rows}
    assert not quarantine.counts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "id,caption,file\np0,a red, round ball,0.png\n",
            "row of 4 fields, expected 3: one with delimiters must be quoted",
        ),
        (
            "id,file,caption\np0,0.png,a red, round ball\n",
            "row of 4 fields, expected 3: one with delimiters must be quoted",
        ),
        ('id,caption,file\np0,"a" red ball,0.png\n', "not CSV: ',' expected after '\"'"),
        ('id,caption,file\np0,a,"0.png\n', "not CSV: unexpected end of data"),
        (b"id,caption,file\np0,caf\xe9,0.png\n", "not UTF-8"),
        (f"id,caption,file\np0,{'x' * 200_000},0.png\n", "not CSV: field larger than field limit (131072)"),
        ("id,caption,caption,file\np0,a,b,0.png\n", "file is lost: the header has 'caption' more than once"),
        ("id,caption,file\np0\n", '"file" is of type NoneType, expected str'),
    ],
)
def test_odd_rows_of_csv_are_named_and_cost_only_themselves(tmp_path, text, said):
    write_set(tmp_path, ["0.png", "1.png"], ["0.png", "1.png"])
    path = tmp_path / "table.csv"
    data = text if isinstance(text, bytes) else text.encode()
    head = data.partition(b"\n")[0]
    good = {b"id,caption,file": b"good,a cat,1.png\n", b"id,file,caption": b"good,1.png,a cat\n"}.get(head, b"")
    path.write_bytes(head + b"\n" + good + data.partition(b"\n")[2])  # an open quote takes all that follows
    quarantine = Quarantine(tmp_path / "q.jsonl")
    config = CaptionedConfig(str(path), str(tmp_path / "images"), held_out_fraction=0.0)
    if good:
        source = CaptionedSource(config, quarantine)
        assert source.prompts("train", 9, 0) == [Prompt("good", "a cat", REPLY)]
    else:
        with pytest.raises(ValueError, match="no usable caption"):
            CaptionedSource(config, quarantine)
    assert quarantine.counts[said] == quarantine.lost == 1


@pytest.mark.parametrize(
    "text",
    [
        "sep=;\nid;caption;file\np0;a, b;0.png\n",
        'sep=,\r\nid,caption,file\r\np0,"a, b",0.png\r\n',
        'id, caption, file\np0, "a, b", 0.png\n',
        'id,caption,file,,\np0,"a, b",0.png,,\n',
        'id,caption,file\np0,"a, b",0.png,,\n',
        'file,caption,id\n0.png,"a, b"\n',
        '\n \nid,caption,file\np0,"a, b",0.png\n',
        '\ufeff\ufeffid , caption ,file\np0,"a, b",0.png\n',
        '\ufeffid,caption,file\n\n\np0,"a, b",0.png\n\n',
    ],
)
def test_dialects_of_csv_that_programs_write_are_read(tmp_path, text):
    write_set(tmp_path, ["0.png"], ["0.png"])
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode())
    source, quarantine = captioned(tmp_path, captions=str(path), held_out_fraction=0.0)
    (prompt,) = source.prompts("train", 9, 0)
    assert prompt.text == "a, b" and not quarantine.counts


def test_files_of_the_operating_system_are_no_images(tmp_path):
    write_set(tmp_path, ["0.png"], ["0.png"])
    for kind in ("images", "winners"):
        (tmp_path / kind / "__MACOSX").mkdir()
        for name in ("._0.png", ".DS_Store", "__MACOSX/0.png"):
            (tmp_path / kind / name).write_bytes(b"x")
    _, quarantine = captioned(tmp_path, held_out_fraction=0.0)
    assert not quarantine.counts


@pytest.mark.parametrize("missing", [None, ""])
def test_a_caption_without_an_identifier_has_its_images_name(tmp_path, missing):
    write_set(tmp_path, ["0.png"], ["0.png"], [{"id": missing, "caption": "a cat", "file": "0.png"}])
    source, _ = captioned(tmp_path, held_out_fraction=0.0)
    assert source.prompts("train", 9, 0) == [Prompt("0.png", "a cat", REPLY)]


def test_metadata_of_image_folders_is_read_by_its_fields(tmp_path):
    write_set(tmp_path, ["sub/0.png"], ["sub/0.png"])
    (tmp_path / "images" / "metadata.jsonl").write_text('{"file_name": "sub/0.png", "text": "a cat"}\n')
    path = str(tmp_path / "images" / "metadata.jsonl")
    fields = {"image_field": "file_name", "caption_field": "text"}
    source, _ = captioned(tmp_path, captions=path, held_out_fraction=0.0, **fields)
    assert source.prompts("train", 9, 0) == [Prompt("sub/0.png", "a cat", REPLY)]
    with pytest.raises(ValueError, match=r"lines have the keys file_name, text; data.image_field=file, data.caption"):
        captioned(tmp_path, captions=path)


@pytest.mark.parametrize("winners", [[], ["x.png"], ["0.txt"]])
def test_no_winner_at_all_is_refused_with_an_expected_name(tmp_path, winners):
    write_set(tmp_path, ["0.png"], [])
    for name in winners:
        (tmp_path / "winners" / name).write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"preference.winners=.*: no winner of 1 captions, expected names such as 0.png"
    ):
        captioned(tmp_path)


def test_captions_in_another_encoding_and_endless_lines_are_named(tmp_path, monkeypatch):
    write_set(tmp_path, ["0.png"], ["0.png"])
    path = tmp_path / "captions.jsonl"
    good = path.read_bytes()
    path.write_bytes(good.decode().encode("utf-16"))
    with pytest.raises(ValueError, match="captions.jsonl: encoded as UTF-16, expected UTF-8"):
        captioned(tmp_path)
    monkeypatch.setattr(formats, "LONGEST", 1000)
    path.write_bytes(b'{"id": "' + b"x" * 5000 + b'"}\n' + good)
    source, quarantine = captioned(tmp_path, held_out_fraction=0.0)
    assert source.lines == 2 and quarantine.counts == {"row of more than 1000 bytes": 1}
