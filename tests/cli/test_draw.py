"""Drawing images of prompts."""

from pathlib import Path

from PIL import Image

from vargpt_rl.generate import free_path, main_draw


def test_images_are_named_after_prompts_and_never_overwritten(tmp_path, checkpoint, capsys):
    settings = [f"checkpoint={checkpoint}", f"out={tmp_path}", "resolution=64", "images=2"]
    assert main_draw(["A red circle!"], settings) == 0
    assert main_draw(["A red circle!"], [*settings[:-1], "cfg=1"]) == 0
    names = ["a-red-circle.png", "a-red-circle-2.png", "a-red-circle-3.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / name) for name in names]
    assert Image.open(tmp_path / names[0]).size == (64, 64)


def test_an_image_can_be_edited(tmp_path, checkpoint, capsys):
    edited = {}
    for colour in ("red", "blue"):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{colour}.png")
        settings = [f"checkpoint={checkpoint}", f"out={tmp_path / 'edited'}", "resolution=64"]
        assert main_draw(["Recolour it."], [*settings, f"image={tmp_path / colour}.png"]) == 0
        edited[colour] = Path(capsys.readouterr().out.strip()).read_bytes()
    assert edited["red"] != edited["blue"], "the image is seen"


def test_an_image_that_cannot_be_read_is_named(tmp_path, checkpoint, capsys):
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (3000, 10)).save(tmp_path / "thin.png")
    refused = {
        "": "image= is empty",
        f"{tmp_path}/none.png": f"image={tmp_path}/none.png: not a readable image",
        f"{tmp_path}/text.png": f"image={tmp_path}/text.png: not a readable image: image of no known kind",
        str(tmp_path): f"image={tmp_path}: not a readable image: image is not a plain file",
        f"{tmp_path}/thin.png": f"image={tmp_path}/thin.png: 3000 x 10 pixels, expected sides of at most 200:1",
    }
    for image, message in refused.items():
        settings = [f"checkpoint={checkpoint}", f"out={tmp_path / 'out'}", f"image={image}"]
        assert main_draw(["Recolour it."], settings) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_prompt_without_letters_has_a_name(tmp_path):
    assert free_path(tmp_path, "?!").name == "image.png"
    assert free_path(tmp_path, "x/../../y").name == "x-y.png"


def test_an_empty_prompt_is_refused(tmp_path, checkpoint, capsys):
    assert main_draw([], [f"checkpoint={checkpoint}", f"out={tmp_path}"]) == 2
    assert "expected a prompt, got none" in capsys.readouterr().err
    assert main_draw([" "], [f"checkpoint={checkpoint}", f"out={tmp_path}"]) == 2
    assert "expected a prompt" in capsys.readouterr().err
