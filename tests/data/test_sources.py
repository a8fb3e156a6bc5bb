import json
import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vargpt_rl.data import shapes
from vargpt_rl.data.quarantine import Quarantine
from vargpt_rl.data.samples import Prompt
from vargpt_rl.data.shapes_check import check
from vargpt_rl.data.shapes_edit_check import check_edit
from vargpt_rl.data.sources import (
    CaptionedConfig,
    CaptionedSource,
    ShapesConfig,
    ShapesSource,
    prompts_from_file,
)

SHARED = Path(os.environ.get("VARGPT_SHARED", Path(__file__).resolve().parents[2] / "../shared"))


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.mode == b.mode == "RGB" and np.array_equal(np.asarray(a), np.asarray(b))


# Shapes


@pytest.fixture
def world():
    return ShapesSource(ShapesConfig())


def test_shapes_keys_rebuild_the_very_image_elsewhere(world):
    elsewhere = pickle.loads(pickle.dumps(world))
    keys = [record.image for record in world.records(5, 0)]
    keys += [world.winner_key(prompt) for prompt in world.prompts("held_out", 5, 0)]
    keys += [key for key, *_ in world.questions(5, 0, "train")]
    keys += [key for before, _, after in world.edits(5, 0) for key in (before, after)]
    for key in keys:
        image = world.load(key, 64)
        assert image.size == (64, 64)
        assert same(image, elsewhere.load(key, 64))


def test_shapes_prompts_are_stable_and_keep_their_split(world):
    for split in ("train", "held_out"):
        prompts = world.prompts(split, 40, 3)
        assert [prompt.id for prompt in prompts] == [f"shapes-{split}-3-{index}" for index in range(40)]
        assert all(shapes.is_held_out(prompt.text) == (split == "held_out") for prompt in prompts)
        assert world.prompts(split, 10, 3) == prompts[:10]
        assert [p.text for p in world.prompts(split, 40, 4)] != [p.text for p in prompts]
    assert all(not shapes.is_held_out(record.prompt.text) for record in world.records(40, 0))
    assert len({record.image for record in world.records(40, 0)}) == 40


def test_shapes_winners_are_right_and_the_corpus_is_noisy(world):
    prompts = world.prompts("train", 30, 0)
    assert all(check(world.load(world.winner_key(prompt), 128), prompt.text).correct for prompt in prompts)
    corpus = [np.asarray(world.load(record.image, 64), float) for record in world.records(5, 0)]
    assert all(np.abs(np.diff(image[:4], axis=1)).mean() > 1 for image in corpus)
    assert world.winner_key(Prompt("mine-1", "a photograph of a cat")) is None


def test_shapes_questions_are_about_their_images(world):
    asked = world.questions(60, 1, "held_out")
    assert {key.split("/")[0] for key, *_ in asked} == {"clean", "commercial"}
    assert len({key.split("/")[1] for key, *_ in asked}) == len(asked)  # layouts of their own
    numbers = {"one": 1, "two": 2, "three": 3, "four": 4}
    for key, question, answer in asked:
        scene = world.scene(key)
        assert shapes.is_held_out(scene.caption)
        assert check(world.load(key, 128), scene.caption).correct
        if question == "how many things are there?":
            assert numbers[answer] == len(scene.things)
        if question.startswith("what colour is the"):
            shape = question.removeprefix("what colour is the ").removesuffix("?")
            assert [thing.colour for thing in scene.things if thing.shape == shape] == [answer]


def test_shapes_edits_lead_from_one_image_to_the_other(world):
    for before, instruction, after in world.edits(20, 2):
        assert instruction
        scenes = world.scene(before), world.scene(after)
        assert scenes[0] != scenes[1]
        assert check_edit(*scenes, world.load(after, 128)).correct
        assert not check_edit(*scenes, world.load(before, 128)).correct
    assert all(shapes.is_held_out(world.scene(before).caption) for before, *_ in world.edits(5, 2, "held_out"))


def test_shapes_bad_input_is_named(world):
    for key in ("clean/one/a circle", "clean/1", "nothing"):
        with pytest.raises(ValueError, match=f"shapes key '{key}': expected"):
            world.load(key, 64)
    with pytest.raises(ValueError, match="'a dog'"):
        world.load("clean/1/a dog", 64)
    with pytest.raises(ValueError, match="'oil'"):
        world.load("oil/1/a circle", 64)
    with pytest.raises(ValueError, match="'oil'"):
        ShapesConfig(winner_style="oil")


# Captioned images


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
        '{"id": 7, "caption": "a", "file": "0.png"}',
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
        ("captions.jsonl:14", '"id" is of type int, expected str', True),
        ("captions.jsonl:15", '"caption" is empty', True),
        ("captions.jsonl:16", '"caption" has characters that are no text', True),
        ("captions.jsonl:17", "list where a JSON object is expected", True),
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
    for file, said in (("0", "truncated"), ("1", "cannot identify"), ("2", "No such file"), ("4", "31 x 31.*900")):
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


# Prompts alone


def test_prompts_from_files(tmp_path):
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    plain, lines = tmp_path / "mine.txt", tmp_path / "mine.jsonl"
    plain.write_bytes("\ufeffa cat\r\n\r\n a dog \na cat\n\u00e9t\u00e9".encode() + b"\n\xff\n")
    lines.write_text('{"prompt": "a cat"}\n{"text": "a dog"}\n{"prompt": "a cat"}\n' + "[" * 100_000 + "\n")
    prompts = prompts_from_file(plain, quarantine)
    assert [prompt.text for prompt in prompts] == ["a cat", "a dog", "\u00e9t\u00e9"]
    assert len({prompt.id for prompt in prompts}) == 3
    assert quarantine.counts == {"prompt of an earlier line": 1, "not UTF-8": 1}
    assert [prompt.text for prompt in prompts_from_file(lines, quarantine)] == ["a cat"]
    assert quarantine.counts["prompt of an earlier line"] == 2
    assert quarantine.counts['"prompt" is missing'] == quarantine.counts["not JSON: too deeply nested"] == 1


def test_prompts_may_have_ids(tmp_path):
    quarantine, lines = Quarantine(tmp_path / "quarantine.jsonl"), tmp_path / "mine.jsonl"
    rows = [("a", "a cat"), ("b", "a dog"), ("a", "a cow"), ("c", "a dog"), (3, "a fish"), ("", "a bird")]
    lines.write_text("".join(json.dumps({"id": one, "prompt": text}) + "\n" for one, text in rows))
    assert [(prompt.id, prompt.text) for prompt in prompts_from_file(lines, quarantine)] == rows[:2]
    assert quarantine.counts == {
        "id of an earlier line": 1,
        "prompt of an earlier line": 1,
        '"id" is of type int, expected str': 1,
        '"id" is empty': 1,
    }


def test_unusable_prompt_files_are_named(tmp_path):
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "prompts.csv").write_text("a cat\n")
    for name, said in (("empty.txt", "no usable prompt"), ("none.txt", "no such file"), ("prompts.csv", "expected a")):
        with pytest.raises(ValueError, match=f"{name}: {said}"):
            prompts_from_file(tmp_path / name, quarantine)
