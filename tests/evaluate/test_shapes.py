"""The shapes benchmark: right and wrong images, edits and answers, resuming, sharding and bad settings."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from vargpt_rl.common.averages import wilson
from vargpt_rl.data import shapes
from vargpt_rl.data.sources import ShapesConfig, ShapesSource
from vargpt_rl.evaluate import evaluated_model
from vargpt_rl.evaluate.__main__ import main
from vargpt_rl.evaluate.evaluated_model import model_digest
from vargpt_rl.evaluate.settings import Benchmark, EvaluateConfig
from vargpt_rl.evaluate.shapes import Shapes
from vargpt_rl.inference import images

LIMIT = 12
SOURCE = ShapesSource(ShapesConfig())
EDITS = {(before, instruction): after for before, instruction, after in SOURCE.edits(LIMIT, 0, "held_out")}
TRUTHS = {(question, key): truth for key, question, truth in SOURCE.questions(LIMIT, 0, "held_out")}


@pytest.fixture
def artist(monkeypatch):
    """A model that does everything right but the prompts in the returned set. Also returns the lines it was given."""
    wrong, asked = set(), []

    def draw(model, chat, lines, look):
        asked.extend(lines)
        images = []
        for line in lines:
            right = line["prompt"] not in wrong
            if line["image"]:
                assert look(line["image"]).size == (224, 224)
                key = EDITS[line["image"], line["prompt"]] if right else line["image"]
                images.append(SOURCE.load(key, line["size"][0]))
            else:
                rng = np.random.default_rng(line["seed"])
                scene = shapes.scene_for(line["prompt"], rng)
                blank = Image.new("RGB", tuple(line["size"]), "white")
                images.append(shapes.render(scene, line["size"][0], "clean", rng) if right else blank)
        return images

    monkeypatch.setattr(images, "draw_batch", draw)
    monkeypatch.setattr(evaluated_model, "load", lambda *_: (None, None))
    seen = {(question, SOURCE.load(key, 224).tobytes()): truth for (question, key), truth in TRUTHS.items()}

    def answers(engine, questions, tokens):
        return ["" if text in wrong else seen[text, image.tobytes()] for text, (image,) in questions]

    monkeypatch.setattr(evaluated_model, "answers", answers)
    return wrong, asked


def test_right_results_score_one_and_wrong_ones_less(command, artist, result, tmp_path):
    wrong, asked = artist
    arguments = ["benchmark=shapes", f"limit={LIMIT}", "resolution=128"]
    assert command(*arguments) == 0
    row = result("shapes")
    assert {"overall", "edits", "questions"} < set(row["metrics"])
    assert set(row["metrics"].values()) == {1.0}
    low, high = row["intervals"]["overall"]
    assert 0.5 < low < 1.0 == high, "a handful of right images does not show that all are"
    assert row["counts"]["overall"] == row["counts"]["edits"] == row["counts"]["questions"] == LIMIT
    assert len(asked) == 2 * LIMIT

    captions = [line["prompt"] for line in asked if not line["image"]]
    wrong |= {captions[0], captions[1], next(iter(EDITS))[1], next(iter(TRUTHS))[0]}
    lost = sum(caption in captions[:2] for caption in captions) / LIMIT
    assert command(*arguments, f"out={tmp_path / 'out'}/worse") == 0
    worse = json.loads((tmp_path / "out/worse/shapes.json").read_text())["measured"][0]
    assert worse["metrics"]["overall"] == pytest.approx(1 - lost)
    assert worse["intervals"]["overall"] == pytest.approx(wilson(LIMIT * (1 - lost), LIMIT))
    assert worse["metrics"]["edits"] < 1 and worse["metrics"]["questions"] < 1
    details = worse["details"]["edits"]
    assert details["overall"] == worse["metrics"]["edits"] and details["done"] < details["kept"] == 1
    kinds = ("add", "remove", "colour", "shape", "size")
    assert any(details.get(kind, 1) < 1 for kind in kinds)
    tasks = {task: worse["metrics"][task] for task in shapes.TASKS if task in worse["metrics"]}
    assert min(tasks.values()) < 1 and sum(worse["counts"][task] for task in tasks) == LIMIT


def test_images_do_not_depend_on_batch_size_or_shard(command, tmp_path, capsys):
    def images(out) -> dict[str, bytes]:
        (folder,) = (path for path in (tmp_path / out / "shapes").iterdir() if path.is_dir())
        return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}

    arguments = ["benchmark=shapes", "limit=2"]
    assert command(*arguments, f"out={tmp_path / 'whole'}", "batch_size=2") == 0
    for shard in (1, 0):
        assert command(*arguments, f"out={tmp_path / 'parts'}", "batch_size=1", "num_shards=2", f"shard={shard}") == 0
        assert f"part {shard} of 2 is done" in capsys.readouterr().out
        assert len(images("parts")) == {1: 2, 0: 4}[shard]
    assert not (tmp_path / "parts/shapes.json").exists()
    whole = images("whole")
    assert images("parts") == whole and len(set(whole.values())) == 4
    assert command(*arguments, f"out={tmp_path / 'parts'}") == 0
    measured = [json.loads((tmp_path / out / "shapes.json").read_text())["measured"] for out in ("whole", "parts")]
    assert measured[0][0]["metrics"] == measured[1][0]["metrics"]


def test_resumes_and_rejects_changed_settings(command, artist, tmp_path, capsys):
    _, asked = artist
    arguments = ["benchmark=shapes", f"limit={LIMIT}"]
    assert command(*arguments) == 0
    (image,) = (tmp_path / "out/shapes").glob("*/drawings/00003.png")
    before = image.read_bytes()
    image.unlink()
    asked.clear()
    assert command(*arguments) == 0
    assert [line["file"] for line in asked] == ["drawings/00003.png"] and image.read_bytes() == before
    for setting, said in (("cfg=2", "cfg=1.0, now it is 2.0"), ("seed=1", "prompt="), ("tau=0.7", "tau=0.5")):
        capsys.readouterr()
        assert command(*arguments, setting) == 2
        assert f"was made with {said}" in capsys.readouterr().err


def test_rejects_images_of_other_weights(command, artist, checkpoint, tmp_path, capsys):
    own = shutil.copytree(checkpoint, tmp_path / "own")
    arguments = ["benchmark=shapes", f"limit={LIMIT}", f"checkpoint={own}"]
    assert command(*arguments) == 0
    weights = own / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert command(*arguments) == 2
    assert "was made with weights=" in capsys.readouterr().err


def test_digest_covers_weights_and_tokenizer_only(checkpoint, tmp_path):
    own = shutil.copytree(checkpoint, tmp_path / "own")
    assert model_digest(own) == model_digest(checkpoint)
    (own / "README.md").write_text("a note")
    assert model_digest(own) == model_digest(checkpoint)
    (own / "tokenizer_config.json").write_text("{}")
    assert model_digest(own) != model_digest(checkpoint)


def test_reports_checkpoints_side_by_side(command, artist, checkpoint, tmp_path):
    names = [shutil.copytree(checkpoint, tmp_path / folder / "model") for folder in ("first", "second")]
    assert command("benchmark=shapes", "limit=2", f"checkpoints=[{names[0]}, {names[1]}]") == 0
    table = (tmp_path / "out/shapes.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[4:6]] == [f"| {name}" for name in names]
    report = json.loads((tmp_path / "out/shapes.json").read_text())
    assert [row["checkpoint"] for row in report["measured"]] == [str(name) for name in names]
    assert len({row["folder"] for row in report["measured"]}) == 2
    assert report["settings"]["limit"] == 2 and report["reported"]["rows"] == {}


def test_seed_selects_captions(artist):
    configs = (EvaluateConfig(benchmark=Benchmark.shapes, limit=5, resolution=64, seed=seed) for seed in (0, 1))
    benchmarks = [Shapes(config) for config in configs]
    assert len(benchmarks[0].captions) == 5 and benchmarks[0].captions != benchmarks[1].captions


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["benchmark=shape"], "benchmark=shape: "),
        ([], "benchmark is not given"),
        (["benchmark=shapes", "prompts=a.txt"], "prompts=a.txt: benchmark=shapes does not use it"),
        (["benchmark=shapes", "max_tokens=3"], "max_tokens=3: benchmark=shapes does not use it"),
        (["benchmark=geneval"], "prompts is not given: benchmark=geneval needs prompts=..."),
        (["benchmark=geneval", "prompts=nowhere.jsonl"], "prompts=nowhere.jsonl: no such file"),
        (["benchmark=hps", "prompts=a.txt"], "weights is not given: benchmark=hps needs weights=..."),
        (["benchmark=fid", "prompts=a.txt", "weights=b"], "reference is not given: benchmark=fid needs reference=..."),
        (["benchmark=clip", "prompts=nowhere.txt"], "prompts=nowhere.txt: no such file"),
        (["benchmark=shapes", "limit=0"], "limit=0: expected 1 or more"),
        (["benchmark=shapes", "batch_size=0"], "batch_size=0: expected 1 or more"),
        (["benchmark=shapes", "shard=1"], "shard=1: expected less than num_shards=1"),
        (["benchmark=shapes", "num_shards=0"], "num_shards=0: expected 1 or more"),
        (["benchmark=shapes", "max_bad_fraction=2"], "max_bad_fraction=2.0: expected 0 to 1"),
        (["benchmark=shapes", "resolution=48"], "benchmark=shapes needs square images of 64 px or more, got 48x48"),
        (["benchmark=shapes", "resolution=128", "aspect=4:3"], "benchmark=shapes needs square images"),
        (["benchmark=shapes", "checkpoint=/nowhere"], "checkpoint=/nowhere: no such directory"),
        (
            ["benchmark=shapes", "checkpoint=/nowhere", "checkpoints=[a]"],
            "expected either checkpoint=... or checkpoints",
        ),
        (["benchmark=shapes", "checkpoints=[a,a]"], "checkpoints=['a', 'a']: expected different checkpoints"),
        (["benchmark=shapes", "checkpoints=a"], "checkpoint=a: no such directory"),
        (["benchmark=shapes", "out={}/file"], "out={}/file/shapes: Not a directory"),
    ],
)
def test_bad_settings_fail_before_loading_a_model(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluated_model, "load", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    assert main([argument.format(tmp_path) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {said.format(tmp_path)}")
    assert message.count("\n") == 1
