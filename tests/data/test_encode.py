"""Encoding training records once: what is in the cache afterwards, and what is said about the rest."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.helpers.records import png
from tests.helpers.streams import COUNT, feed_of, write_sources
from tests.helpers.tiny import tiny_checkpoint
from vargpt_rl.data import encode
from vargpt_rl.data.encode import crops_of, drawn_images, features_of, main
from vargpt_rl.data.features import FeatureCache, load_image_tokenizer, shard_files, tokenizer_checksum
from vargpt_rl.data.records.images import InRecord, content_sha256, on_disk
from vargpt_rl.data.records.schema import Message, RecordConversation

SIDE = 32


def record(task: str, number: int, images: list[str]) -> dict:
    asked, drawn = {"generation": ("", 1), "editing": ("<image>", 1), "understanding": ("<image>", 0)}[task]
    texts = [("user", f"{asked} go"), ("assistant", "here" + "<image_gen>" * drawn)]
    messages = [{"role": role, "content": text} for role, text in texts]
    return {"id": f"{task}{number}", "task": task, "messages": messages, "images": images}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven images, 0 and 1 the same file twice; 5 is shown and not drawn, 6 is broken, 7 is missing."""
    folder = tmp_path_factory.mktemp("records")
    for number in range(7):
        (folder / f"{number}.png").write_bytes(png(max(number, 1), (40 + number, 50)))
    (folder / "1.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "6.png").write_bytes(png(6)[:-30])
    rows = [record("generation", number, [f"{number}.png"]) for number in (0, 1, 2, 3, 6, 7)]
    rows += [record("editing", 4, ["5.png", "4.png"]), record("understanding", 5, ["5.png"])]
    for name, part in (("all", rows), ("first", rows[:2]), ("good", rows[:4] + rows[6:]), ("seen", rows[7:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.fixture(scope="module")
def sources(folder, checkpoint):
    def arguments(out: Path, name: str, *more: str) -> list[str]:
        given = [f"checkpoint={checkpoint}", f"out={out}", f"resolution={SIDE}", "crops=2", "batch_size=4"]
        given += [f"sources.mine.files={folder}/{name}.jsonl", "workers=0", *more]
        return list({argument.partition("=")[0]: argument for argument in given}.values())

    return arguments


@pytest.fixture(scope="module")
def checksum(model):
    return tokenizer_checksum(model.image_tokenizer.state_dict())


def contents(out: Path, checksum: str, folder: Path, crops: int = 2) -> dict[tuple[int, int], bytes]:
    """The features in a cache by image and crop."""
    cache = FeatureCache(out, checksum, SIDE)
    found = {}
    for number in range(6):
        for crop in range(crops):
            features = cache.get(content_sha256(on_disk(folder, f"{number}.png")), crop)
            if features is not None:
                found[number, crop] = features.tobytes()
    assert len(set(found.values())) == len(cache), "nothing else is in it"
    return found


def test_drawn_images_are_in_the_cache_with_their_features(folder, sources, checksum, model, tmp_path):
    assert main(sources(tmp_path, "good")) == 0
    cache = FeatureCache(tmp_path, checksum, SIDE)
    assert cache.crops == 2 and len(cache) == 2 * 4
    for number in (0, 1, 2, 3, 4):
        image = on_disk(folder, f"{number}.png")
        digest = content_sha256(image)
        for crop, pixels in crops_of(image, digest, SIDE, (0, 1)).items():
            image_13HW = torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1
            with torch.no_grad():
                expected = model.image_tokenizer.features(image_13HW)[0].numpy()
            # half a step of float16 of values below 4, and a batch of another size is added up in another order
            assert np.abs(cache.get(digest, crop) - expected).max() <= 2e-3
    assert (content_sha256(on_disk(folder, "5.png")), 0) not in cache, "shown, not drawn"


def test_features_do_not_depend_on_how_the_work_was_cut(folder, sources, checksum, tmp_path, monkeypatch):
    whole, parts, ranks = (tmp_path / name for name in ("whole", "parts", "ranks"))
    assert main(sources(whole, "good", "workers=2")) == 0
    assert main(sources(parts, "first", "crops=1")) == 0
    calls = []

    def cut_off(*args):
        if calls:
            raise KeyboardInterrupt
        calls.append(args)
        return features_of(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encode, "features_of", cut_off)
        main(sources(parts, "good"))
    assert len(FeatureCache(parts, checksum, SIDE)) == 1 + 4, "one, and the batch before the interruption"
    assert main(sources(parts, "good")) == 0
    for rank in (1, 0):
        assert main(sources(ranks, "good", f"rank={rank}", "world=2")) == 0
    assert len(shard_files(whole)) == 1 and len(shard_files(parts)) == 3 and len(shard_files(ranks)) == 2
    expected = contents(whole, checksum, folder)
    assert len(expected) == 10
    assert contents(parts, checksum, folder) == contents(ranks, checksum, folder) == expected


def test_what_is_there_is_not_even_decoded(folder, sources, tmp_path, monkeypatch, capsys):
    assert main(sources(tmp_path, "good")) == 0
    before = {path: path.stat().st_mtime_ns for path in shard_files(tmp_path)}
    monkeypatch.setattr(encode, "load", None)
    assert main(sources(tmp_path, "good")) == 0
    assert {path: path.stat().st_mtime_ns for path in shard_files(tmp_path)} == before
    counts = capsys.readouterr().out.splitlines()[-6:]
    lines = ["6  records", "0  bad records", "5  images to draw", "1  repeated images"]
    assert [line.strip() for line in counts] == [*lines, "0  crops encoded", "8  kept"]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_put_aside_and_counted(sources, checksum, folder, tmp_path, capsys, workers):
    for _ in range(2):  # the second time finds the same again
        assert main(sources(tmp_path, "all", f"workers={workers}", "max_bad_fraction=0.25")) == 0
        out = [line.strip() for line in capsys.readouterr().out.splitlines()]
        assert out[:2] == ["8  records", "2  bad records"]
        assert out[6:] == ["1  bad: image is missing", "1  bad: image is unreadable (OSError)"]
        lines = [line for path in tmp_path.rglob("*.jsonl") for line in path.read_text().splitlines()]
        assert sorted(json.loads(line)["source"] for line in lines) == [f"{folder}/all.jsonl:{n}" for n in (5, 6)]
    assert main(sources(tmp_path, "all", f"workers={workers}", "max_bad_fraction=0.2")) == 1
    assert "2 of 8 records are bad, more than max_bad_fraction=0.2" in capsys.readouterr().err
    assert len(contents(tmp_path, checksum, folder)) == 10


def test_what_was_mended_is_no_longer_counted_as_bad(sources, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps(record("generation", 1, ["a.png"])) + "\n")
    arguments = [*sources(tmp_path / "out", "all"), "max_bad_fraction=1"]
    arguments = [a for a in arguments if not a.startswith("sources")] + [f"sources.mine.files={tmp_path}/a.jsonl"]
    assert main(arguments) == 0
    assert "1  bad: image is missing" in capsys.readouterr().out
    (tmp_path / "a.png").write_bytes(png())
    assert main(arguments) == 0
    assert "bad:" not in capsys.readouterr().out
    assert not list((tmp_path / "out").rglob("*.jsonl"))


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("resolution=33", "resolution 33x33: 33 is not a positive multiple of 16"),
        ("crops=0", "crops=0: expected 1 or more"),
        ("rank=2", "rank=2: expected 0 or more and less than world=1"),
        ("max_bad_fraction=2", "max_bad_fraction=2.0: expected 0 to 1"),
        ("sources.mine.format=xml", "format=xml: expected one of"),
        ("sources.mine.files=none.jsonl", "source mine: files: nothing fits none.jsonl"),
        ("checkpoint=none", "checkpoint=none: no such directory"),
    ],
)
def test_wrong_settings_are_named_in_one_line(sources, tmp_path, capsys, argument, said):
    assert main(sources(tmp_path, "good", argument)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_cache_of_another_tokenizer_is_refused_and_left_alone(sources, tmp_path, capsys):
    other = tiny_checkpoint(tmp_path / "other", seed=1)
    assert main(sources(tmp_path / "out", "first")) == 0
    before = sorted((tmp_path / "out").rglob("*"))
    capsys.readouterr()
    assert main(sources(tmp_path / "out", "good", f"checkpoint={other}")) == 2
    error, theirs = capsys.readouterr().err, tokenizer_checksum(load_image_tokenizer(other).state_dict())
    assert f"expected those of {theirs} at {SIDE} px" in error and error.count("\n") == 1
    assert sorted((tmp_path / "out").rglob("*")) == before


def test_records_that_draw_nothing_are_an_error_unless_they_are_a_share(sources, tmp_path, capsys):
    assert main(sources(tmp_path, "seen")) == 2
    assert "sources mine: no record draws an image" in capsys.readouterr().err
    assert main(sources(tmp_path, "seen", "world=2")) == 0


def test_a_model_without_an_image_tokenizer_is_refused(checkpoint, tmp_path):
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    tensors = load_file(checkpoint / "model.safetensors")
    lost = "image_tokenizer.encoder.conv_in.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"^{tmp_path}: {lost} is missing"):
        load_image_tokenizer(tmp_path)


def test_training_takes_what_was_encoded(checkpoint, chat, checksum, tmp_path):
    """All the way: records are encoded by the command, and the stream of a stage takes the features from the cache."""
    sources = write_sources(tmp_path / "data")
    given = [f"checkpoint={checkpoint}", f"out={tmp_path / 'encoded' / '64'}", "resolution=64", "crops=2"]
    for name in ("lines", "tars"):
        given += [f"sources.{name}.files={sources[name].files[0]}", f"sources.{name}.format={sources[name].format}"]
    assert main([*given, f"sources.lines.images={sources['lines'].images}", "workers=0"]) == 0
    feed = feed_of(tmp_path, sources, encoded=tmp_path / "encoded", tokenizer_checksum=checksum)
    known = {content.tobytes() for path in shard_files(tmp_path / "encoded" / "64") for content in load_features(path)}
    assert len(known) == 2 * (COUNT + COUNT), "images 0 to 23 and 100 to 123, drawn twice or once"
    loader = feed.loader(feed.mixture(chat, 4, 0, 0, 1), 0)
    seen = [features.numpy().tobytes() for batch in islice(loader, 20) for features in batch["features"]]
    assert len(set(seen)) > 30 and set(seen) <= known
    with pytest.raises(ValueError, match="expected those of another at 64 px"):
        replace(feed, tokenizer_checksum="another").cache()


def load_features(path: Path) -> np.ndarray:
    return load_file(path)["features"].numpy()


def test_crops_follow_from_content_and_number_alone():
    image = InRecord(png(1, (90, 60)))
    content = content_sha256(image)
    crops = crops_of(image, content, SIDE, range(4))
    assert len({pixels.tobytes() for pixels in crops.values()}) == 4
    assert all(pixels.shape == (SIDE, SIDE, 3) and pixels.dtype == np.uint8 for pixels in crops.values())
    (alone,) = crops_of(image, content, SIDE, [2]).values()
    assert (alone == crops[2]).all()
    other = crops_of(image, content_sha256(InRecord(png(2))), SIDE, range(4))
    assert any((other[number] != crops[number]).any() for number in crops)


def test_a_record_may_draw_several_images(tmp_path):
    for number in range(3):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / f"{number}.png")
    images = tuple(on_disk(tmp_path, f"{number}.png") for number in range(3))
    messages = (Message("user", "<image> two more"), Message("assistant", "<image_gen> and <image_gen>"))
    drawn = drawn_images(RecordConversation("1", "", "editing", messages, images), SIDE, 1, ())
    assert [one.content for one in drawn] == [content_sha256(image) for image in images[1:]]
    assert [one.crops[0][0, 0, 0] for one in drawn] == [1, 2]
