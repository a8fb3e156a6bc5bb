"""The command that draws prompts: files and records, sizes, seeds, resuming, and what it refuses."""

import json
import shutil

import pytest
from PIL import Image

from vargpt_rl import generate
from vargpt_rl.generate import main
from vargpt_rl.inference import images
from vargpt_rl.inference.images import ASPECTS, RECORDS, image_size
from vargpt_rl.model.scales import SCHEDULES, schedule_for

PROMPTS = ("a star", "two small blue squares above a large green triangle", "Please draw a red circle.")


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return file


@pytest.fixture
def command(checkpoint, tmp_path):
    """Runs the command on the smallest model, 64 pixels a side; its exit code."""

    def run(*arguments, out="out"):
        defaults = [f"checkpoint={checkpoint}", f"out={tmp_path / out}", "resolution=64", "device=cpu"]
        given = {argument.partition("=")[0] for argument in arguments}
        return main([*(a for a in defaults if a.partition("=")[0] not in given), *arguments])

    return run


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / RECORDS).read_text().splitlines()]


@pytest.mark.parametrize("guidance", [1, 3])
def test_images_do_not_depend_on_the_batch(command, prompts, tmp_path, guidance):
    for size in (1, 4, 6):
        assert command(f"prompts={prompts}", "images=2", f"batch_size={size}", f"cfg={guidance}", out=f"{size}") == 0
    one_by_one = files(tmp_path / "1")
    assert len(one_by_one) == len(set(one_by_one.values())) == 6, "every prompt and image has a seed of its own"
    assert files(tmp_path / "4") == files(tmp_path / "6") == one_by_one
    assert records(tmp_path / "4") == records(tmp_path / "6") == records(tmp_path / "1")


def checkpoint_with(folder, checkpoint, **defaults):
    """Copy a checkpoint and give it defaults of its own."""
    shutil.copytree(checkpoint, folder)
    content = json.dumps({"image_generation": defaults})
    (folder / "generation_config.json").write_text(content)
    return folder


def test_settings_that_are_not_given_are_the_checkpoints(command, checkpoint, tmp_path):
    own = checkpoint_with(tmp_path / "own", checkpoint, resolution=48, cfg=1.5, top_p=0.9)
    assert main([f"checkpoint={own}", "prompt=a star", f"out={tmp_path / 'a'}", "cfg=2", "device=cpu"]) == 0
    (line,) = records(tmp_path / "a")
    assert line["size"] == [48, 48]
    assert line["sampling"] == {"cfg": 2.0, "tau": 0.5, "top_k": 900, "top_p": 0.9}


def test_editing_with_a_checkpoint_that_never_saw_edits_is_warned_of(command, checkpoint, tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    for name, edits in (("no", False), ("yes", True)):
        own = checkpoint_with(tmp_path / name, checkpoint, edits=edits)
        assert (
            command(f"checkpoint={own}", "prompt=make it blue", f"image={tmp_path / 'image.png'}", out=f"{name}-out")
            == 0
        )
        assert ("was not trained on edits" in capsys.readouterr().err) is not edits


def test_a_record_says_how_each_image_was_made(command, checkpoint, prompts, tmp_path, capsys):
    assert command(f"prompts={prompts}", "images=2", "tau=0.7", "seed=5") == 0
    lines = records(tmp_path / "out")
    assert [line["prompt"] for line in lines] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert [line["file"] for line in lines] == [f"{i:05d}-{k:02d}.png" for i in range(3) for k in range(2)]
    assert len({line["seed"] for line in lines}) == 6
    assert lines[0]["sampling"] == {"cfg": 3.0, "tau": 0.7, "top_k": 900, "top_p": 0.97}
    assert (lines[0]["resolution"], lines[0]["size"]) == (64, [64, 64])
    assert (lines[0]["image"], lines[0]["checkpoint"]) == (None, str(checkpoint))
    assert capsys.readouterr().out == f"6 images made: {tmp_path / 'out'}\n"
    assert command(f"prompts={prompts}", "tau=0.7", "seed=6", out="other") == 0
    assert not set(files(tmp_path / "out").values()) & set(files(tmp_path / "other").values())


def test_names_of_files_do_not_come_from_prompts(command, tmp_path):
    assert command("prompt=../../a star\0/\n", out="deep/out") == 0
    assert {path.name for path in (tmp_path / "deep").rglob("*")} == {"out", "00000-00.png", RECORDS}


def test_an_interrupted_run_goes_on(command, prompts, tmp_path, monkeypatch, capsys):
    assert command(f"prompts={prompts}", "batch_size=1", out="whole") == 0
    draw_batch = images.draw_batch
    calls = []

    def fail_the_second_time(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw_batch(*arguments)

    monkeypatch.setattr(images, "draw_batch", fail_the_second_time)
    with pytest.raises(KeyboardInterrupt):
        command(f"prompts={prompts}", "batch_size=1")
    assert len(records(tmp_path / "out")) == len(files(tmp_path / "out")) == 1
    assert command(f"prompts={prompts}", "batch_size=2") == 0
    assert "2 images made, 1 was there already" in capsys.readouterr().out
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert records(tmp_path / "out") == records(tmp_path / "whole")

    (tmp_path / "out/00001-00.png").unlink()
    assert command(f"prompts={prompts}") == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert len(records(tmp_path / "out")) == 3


def test_what_is_there_is_not_drawn_again_and_more_can_be_added(command, prompts, tmp_path, monkeypatch):
    assert command(f"prompts={prompts}") == 0
    first = files(tmp_path / "out")
    monkeypatch.setattr(generate, "load", lambda *_: pytest.fail("the model is not needed"))
    assert command(f"prompts={prompts}") == 0
    monkeypatch.undo()
    prompts.write_text("\n".join([*PROMPTS, "a circle"]))
    assert command(f"prompts={prompts}", "images=2") == 0
    later = files(tmp_path / "out")
    assert len(later) == 8
    assert {name: later[name] for name in first} == first


@pytest.mark.parametrize("other", ["cfg=1", "seed=1", "resolution=32", "prompt=a circle", "aspect=4:3"])
def test_other_settings_are_refused_in_the_same_folder(command, tmp_path, capsys, other):
    assert command("prompt=a star") == 0
    first = files(tmp_path / "out")
    changed = [other] if other.startswith("prompt") else ["prompt=a star", other]
    assert command(*changed) == 2
    key = {"aspect": "size"}.get(other.partition("=")[0], other.partition("=")[0])
    assert f"00000-00.png was made with {key}=" in capsys.readouterr().err
    assert files(tmp_path / "out") == first


def test_a_image_can_be_edited(command, tmp_path):
    for colour in ("red", "blue"):
        Image.new("RGB", (56, 84), colour).save(tmp_path / f"{colour}.png")
        edit = ["prompt=Recolour it.", "images=2", f"image={tmp_path / colour}.png"]
        assert command(*edit, out=colour) == 0
        assert command(*edit, "batch_size=1", out=f"{colour}-1") == 0
        assert files(tmp_path / colour) == files(tmp_path / f"{colour}-1")
        assert records(tmp_path / colour)[0]["image"] == str(tmp_path / f"{colour}.png")
    assert not set(files(tmp_path / "red").values()) & set(files(tmp_path / "blue").values())


@pytest.mark.parametrize("resolution", [64, 128, 256, 512, 768, 1024])
@pytest.mark.parametrize("aspect", ASPECTS)
def test_sizes_are_those_of_the_release(resolution, aspect):
    width, height = map(int, aspect.split(":"))
    grids = SCHEDULES[min(SCHEDULES, key=lambda ratio: abs(ratio - height / width))]
    count = len(schedule_for(resolution))
    if resolution == 64 and set(aspect.split(":")) in ({"5", "4"}, {"7", "4"}):
        with pytest.raises(ValueError, match=f"aspect={aspect}: resolution=64 is too coarse"):
            image_size(resolution, aspect)
    else:
        size = image_size(resolution, aspect)
        assert schedule_for(*size) == grids[:count]
        assert size == (grids[count - 1][0] * 16, grids[count - 1][1] * 16)
        assert size[1] / size[0] == pytest.approx(width / height, rel=0.06)


def test_fifteen_aspects_are_known():
    assert " ".join(ASPECTS) == "3:1 5:2 2:1 7:4 3:2 4:3 5:4 1:1 4:5 3:4 2:3 4:7 1:2 2:5 1:3"


def test_wide_images_are_wide(command, tmp_path):
    assert command("prompt=a star", "resolution=128", "aspect=4:3") == 0
    assert Image.open(tmp_path / "out/00000-00.png").size == (192, 144)
    assert records(tmp_path / "out")[0]["size"] == [144, 192]


def test_bad_lines_of_prompts_are_put_down(command, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a star"}\nnot JSON\n{"text": "a circle"}\n')
    assert command(f"prompts={file}") == 0
    assert f"2 lines of {file} have no prompt" in capsys.readouterr().err
    assert len(files(tmp_path / "out")) == 1
    assert (tmp_path / "out/quarantine.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "expected either prompt=... or prompts=FILE"),
        (["prompt=a", "prompts=b.txt"], "expected either prompt=... or prompts=FILE"),
        (["prompt= "], "prompt= is empty"),
        (["prompt=a", "promt=b"], "promt=b: there is no key promt, did you mean prompt?"),
        (["prompt=a", "resolution=100"], "resolution=100: expected a positive multiple of 16"),
        (["prompt=a", "resolution=0"], "resolution=0: expected 1 or more"),
        (["prompt=a", "resolution=large"], "resolution=large: "),
        (["prompt=a", "aspect=16:9"], "aspect=16:9: expected one of 3:1, 5:2, 2:1, 7:4, 3:2, 4:3, 5:4, 1:1, 4:5, "),
        (["prompt=a", "resolution=80", "aspect=4:3"], "aspect=4:3: resolution 80 has no sizes"),
        (["prompt=a", "tau=0"], "tau=0.0: expected"),
        (["prompt=a", "top_p=2"], "top_p=2.0: expected"),
        (["prompt=a", "seed=-1"], "seed=-1: expected"),
        (["prompt=a", "images=0"], "images=0: expected"),
        (["prompt=a", "batch_size=0"], "batch_size=0: expected"),
        (["prompt=a", "device=toaster"], "device=toaster: "),
        (["prompt=a", "dtype=int8"], "dtype=int8: expected"),
        (["prompt=a", "image={}/nowhere.png"], "image={}/nowhere.png: not a readable image"),
        (["prompts={}/nowhere.txt"], "prompts={}/nowhere.txt: no such file"),
        (["prompts={}/empty.txt"], "prompts={}/empty.txt: no usable prompt"),
        (["prompt=a", "checkpoint={}"], "checkpoint={}: no config.json"),
        (["prompt=a", "checkpoint={}/bert"], "checkpoint={}/bert: model_type is 'bert', expected 'vargpt'"),
        (["prompt=a", "out={}/empty.txt"], "out={}/empty.txt: File exists"),
    ],
)
def test_what_is_wrong_is_named_in_a_line_before_the_model_is_loaded(
    command, tmp_path, monkeypatch, capsys, arguments, said
):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    monkeypatch.setattr(generate, "load", lambda *_: pytest.fail("the model was loaded"))
    assert command(*(argument.format(tmp_path) for argument in arguments)) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {said.format(tmp_path)}")
    assert message.count("\n") == 1


def test_a_damaged_record_is_named(command, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / RECORDS).write_text('{"file": \n')
    assert command("prompt=a star") == 2
    assert f"{tmp_path / 'out' / RECORDS} is damaged" in capsys.readouterr().err


def test_a_record_that_was_cut_off_is_none(command, prompts, tmp_path):
    assert command(f"prompts={prompts}") == 0
    first = files(tmp_path / "out"), records(tmp_path / "out")
    file = tmp_path / "out" / RECORDS
    file.write_text(file.read_text()[:-20])
    assert command(f"prompts={prompts}") == 0
    assert (files(tmp_path / "out"), records(tmp_path / "out")) == first
