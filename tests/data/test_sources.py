import json
import pickle

import numpy as np
import pytest
from PIL import Image

from vargpt_rl.data import shapes
from vargpt_rl.data.quarantine import Quarantine
from vargpt_rl.data.samples import Prompt
from vargpt_rl.data.shapes_check import check
from vargpt_rl.data.shapes_edit_check import check_edit
from vargpt_rl.data.sources import ShapesConfig, ShapesSource, prompts_from_file


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


@pytest.mark.parametrize(
    ("text", "prompts", "told"),
    [
        ("a cat\ra dog\r", ["a cat", "a dog"], {}),
        ("a cat\r\ra dog\r\n", ["a cat", "a dog"], {}),
        ('{"prompt": "a cat"}\na dog\n', ["a dog"], {"JSON where plain text is expected": 1}),
        ("{red, blue} cat\n{a}\n", ["{red, blue} cat", "{a}"], {}),
        ("a \x1b[31mcat\na dog\n", ["a dog"], {'"prompt" has characters that are no text': 1}),
        ("\u200b\ufeff\na dog\n", ["a dog"], {'"prompt" is empty': 1}),
        ("a\u2028cat \x0c\x85\n", ["a\u2028cat"], {}),
    ],
)
def test_odd_lines_of_prompts_are_no_prompts(tmp_path, text, prompts, told):
    path, quarantine = tmp_path / "a.txt", Quarantine(tmp_path / "q.jsonl")
    path.write_bytes(text.encode())
    assert [prompt.text for prompt in prompts_from_file(path, quarantine)] == prompts
    assert quarantine.counts == told


def test_prompts_may_have_ids(tmp_path):
    quarantine, lines = Quarantine(tmp_path / "quarantine.jsonl"), tmp_path / "mine.jsonl"
    rows = [("a", "a cat"), ("b", "a dog"), ("a", "a cow"), ("c", "a dog"), (3.5, "a fish"), ("", "a bird"), (7, "x"),
            (8.0, "y")]  # fmt: skip
    lines.write_text("".join(json.dumps({"id": one, "prompt": text}) + "\n" for one, text in rows))
    assert [(prompt.id, prompt.text) for prompt in prompts_from_file(lines, quarantine)] == [
        *rows[:2],
        ("7", "x"),
        ("8", "y"),
    ]
    assert quarantine.counts == {
        "id of an earlier line": 1,
        "prompt of an earlier line": 1,
        '"id" is of type float, expected str': 1,
        '"id" is empty': 1,
    }


@pytest.mark.parametrize("name", ["A.TXT", "a.Jsonl"])
def test_endings_of_prompt_files_may_be_in_capitals(tmp_path, name):
    (tmp_path / name).write_text("a cat\n" if name == "A.TXT" else '{"id": null, "prompt": "a cat"}\n')
    assert [prompt.text for prompt in prompts_from_file(tmp_path / name, Quarantine(tmp_path / "q"))] == ["a cat"]


def test_unusable_prompt_files_are_named(tmp_path):
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "prompts.csv").write_text("a cat\n")
    for name, said in (("empty.txt", "no usable prompt"), ("none.txt", "no such file"), ("prompts.csv", "expected a")):
        with pytest.raises(ValueError, match=f"{name}: {said}"):
            prompts_from_file(tmp_path / name, quarantine)
    for name in ("wide.txt", "wide.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a cat"}', encoding="utf-16")
        with pytest.raises(ValueError, match=f"{name}: encoded as UTF-16, expected UTF-8"):
            prompts_from_file(tmp_path / name, quarantine)
