"""Training of the embedded model: its edit examples are right, and all but the image tokenizer trains."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vargpt_rl
from learners import pretrain_tiny
from learners.pretrain_tiny import (
    MOST_TURNS,
    SEEN_SIDE,
    TEXT_TOKENIZER,
    TrainingSchedule,
    encode_conversations,
    encode_edits,
    load_mean,
    main,
    train_base,
    trouble_with,
)
from vargpt_rl.data.batches import SftCollator
from vargpt_rl.data.shapes import COLOURS
from vargpt_rl.data.shapes_check import find_things
from vargpt_rl.losses.supervised import sft_loss
from vargpt_rl.model.generate import to_uint8
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.prompt import ChatFormat
from vargpt_rl.model.scales import token_count
from vargpt_rl.release.tiny_v1 import make_fresh_v1
from vargpt_rl.stages import STAGES, freeze

TINY = Path(vargpt_rl.__file__).parent / "tiny"


@pytest.fixture
def embedded():
    return Vargpt.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(str(TINY), Vargpt.config_class.from_pretrained(TINY))


def seen(image: Image.Image) -> list[tuple[str, str]]:
    return sorted((thing.colour, thing.shape) for thing in find_things(image))


def test_edits_show_the_image_before_and_teach_the_one_after(embedded, chat):
    edits = encode_edits(embedded, 16, 128, seed=3)
    assert len(edits) == 16 and len({edit.instruction for edit in edits}) > 8
    features_Bdhw = torch.from_numpy(np.stack([edit.features for edit in edits])).float()
    with torch.inference_mode():
        tokenizer = embedded.image_tokenizer
        pixels = to_uint8(tokenizer.decode(tokenizer.quantise(features_Bdhw, tokenizer.schedule_for(128)).summed_Bdhw))
    agree = 0
    for edit, after in zip(edits, pixels.numpy(), strict=True):
        assert edit.before.size == (SEEN_SIDE, SEEN_SIDE)
        agree += follows(edit.instruction, seen(edit.before), seen(Image.fromarray(after)))
    assert agree >= 14, "the image tokenizer's reconstructions are right in 98 of 100"
    batch = SftCollator(chat)([edit.example(chat) for edit in edits])
    assert batch["features"].shape == (16, *edits[0].features.shape) and batch["image_grid_thw"].shape == (16, 3)
    words = [chat.tokenizer.decode(row) for row in batch["input_ids"]]
    assert all(edit.instruction in text for edit, text in zip(edits, words, strict=True))


def follows(instruction: str, before: list, after: list) -> bool:
    """Return True if the instruction turns the objects before into those after."""
    verb, rest = instruction.split(maxsplit=1)
    last = rest.split()[-1]
    colour, shape = re.search(r"(\w+)? ?(circle|square|triangle|cross)", rest).groups()
    named = [thing for thing in before if thing[1] == shape and (colour not in COLOURS or thing[0] == colour)]
    if verb == "add":
        return after == sorted([*before, (colour, shape)])
    others = [thing for thing in before if thing not in named]
    if verb == "remove":
        return after == others
    if verb == "turn":
        new = re.search("circle|square|triangle|cross", last)[0]
        return after == sorted([*others, *((had, new) for had, _ in named)])
    return after == (before if last in ("larger", "smaller") else sorted([*others, *((last, shape) for _ in named)]))


def test_conversations_teach_all_their_images_and_words(embedded, chat):
    talks = encode_conversations(embedded, 12, 128, seed=3)
    assert {len(talk.dialogue.turns) for talk in talks} == set(range(2, MOST_TURNS + 1))
    rows = [talk.row(chat, 128, np.random.default_rng(0)) for talk in talks]
    tokens = token_count(embedded.image_tokenizer.schedule_for(128))
    for talk, row in zip(talks, rows, strict=True):
        turns = talk.dialogue.turns
        drawn, shown = ([turn for turn in turns if turn.drawn], [turn for turn in turns if turn.shown])
        assert len(row.drawn) == len(drawn) > 0
        assert row.text.ids.count(embedded.config.image_gen_pad_token_id) == tokens * len(drawn)
        assert (len(row.vision.image_grid_thw) if row.vision else 0) == len(shown)
        words = chat.tokenizer.decode(row.text.ids)
        places = [words.index(turn.text) for turn in turns]
        assert all(turn.reply in words for turn in turns) and places[0] < places[-1]
    batch = SftCollator(chat)(rows)
    with torch.no_grad():
        loss, _ = sft_loss(embedded, batch, STAGES["base"].noise, 1.0)
    assert loss.isfinite()


def test_resolutions_follow_the_phases():
    schedule = TrainingSchedule(1.0, 0.4, ((0.6, {128: 1.0}), (1.0, {256: 1.0})))
    assert [schedule.shares(step / 10) for step in (0, 5, 6, 9)] == [{128: 1.0}, {128: 1.0}, {256: 1.0}, {256: 1.0}]


@pytest.mark.parametrize("decay", [0.4, 1.0])
def test_base_training_moves_all_but_the_image_tokenizer(embedded, chat, monkeypatch, decay):
    for name, values in {
        "CORPORA": {128: 8},
        "DRAWINGS_PER_STEP": {128: 2},
        "EDITS": {128: 8},
        "CONVERSATIONS": {128: 4},
        "EDITS_PER_STEP": {128: 2},
        "CONVERSATIONS_PER_STEP": {128: 1},
        "QUESTIONS_PER_STEP": 2,
    }.items():
        monkeypatch.setattr(pretrain_tiny, name, values)
    before = {name: tensor.clone() for name, tensor in embedded.state_dict().items()}
    seen = []
    schedule = TrainingSchedule(0.5, decay, ((1.0, {128: 1.0}),))
    train_base(embedded, chat, 2, lambda step, side, metrics: seen.append((step, side, metrics)), schedule, seed=1)
    assert [(step, side) for step, side, _ in seen] == [(0, 128), (1, 128)]
    assert {key.split("/")[0] for _, _, metrics in seen for key in metrics} == {
        "drawings",
        "edits",
        "questions",
        "conversations",
    }
    assert all(np.isfinite(value) for _, _, metrics in seen for value in metrics.values() if np.isscalar(value))
    trained = set(freeze(embedded, STAGES["base"]))
    moved = {name for name, tensor in embedded.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved <= trained
    assert trained - moved <= {"image_decoder.condition.unconditional"}  # learns only where a condition is dropped


def test_the_mean_of_models_is_that_of_their_weights(embedded, tmp_path):
    other = copy.deepcopy(embedded)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    embedded.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "zero")
    mean = load_mean([tmp_path / "one", tmp_path / "zero"]).state_dict()
    assert all(torch.equal(mean[name], parameter / 2) for name, parameter in embedded.named_parameters())


def write_base(folder: Path, words: tuple[str, ...] = ("red",), **settings: object) -> Path:
    """Write a base model whose weights are empty."""
    folder.mkdir()
    (folder / "model.safetensors").touch()
    config = json.loads((TINY / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    (folder / TEXT_TOKENIZER).write_text(json.dumps({"words": words}))
    return folder


def test_only_models_that_go_together_are_continued(tmp_path):
    good, same = write_base(tmp_path / "good"), write_base(tmp_path / "same", dtype="bfloat16")
    assert trouble_with([]) == trouble_with([TINY]) == trouble_with([good, same]) == ""
    assert f"{tmp_path / 'none'}/config.json: [Errno 2]" in trouble_with([good, tmp_path / "none"])
    (write_base(tmp_path / "damaged") / TEXT_TOKENIZER).write_text("{")
    assert f"{tmp_path / 'damaged' / TEXT_TOKENIZER}: Expecting" in trouble_with([tmp_path / "damaged"])
    (write_base(tmp_path / "empty") / "model.safetensors").unlink()
    assert "there is neither model.safetensors nor" in trouble_with([tmp_path / "empty"])
    assert "expected the text tokenizer of" in trouble_with([good, write_base(tmp_path / "other", words=("blue",))])
    deeper = json.loads((TINY / "config.json").read_text())["decoder_config"] | {"depth": 5}
    larger = write_base(tmp_path / "larger", decoder_config=deeper)
    assert f"expected the settings of {good} in config.json" in trouble_with([good, larger])
    make_fresh_v1(tmp_path / "v1", 32, seed=0)
    assert "expected a model of type vargpt, got vargpt_v1" in trouble_with([tmp_path / "v1"])


@pytest.mark.parametrize(
    "options",
    [
        ["--shares", "nan", "nan", "nan"],
        ["--shares", "1", "1", "-1"],
        ["--shares", "0.5", "0.5", "0.5"],
        ["--rate", "0"],
        ["--rate", "inf"],
        ["--seed", "-1"],
        ["--base-steps", "-1"],
        ["--image-tokenizer", str(TINY), "--base", str(TINY)],
        ["--base", "nowhere"],
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tmp_path, monkeypatch, capsys, options):
    monkeypatch.setattr("sys.argv", ["pretrain_tiny", str(tmp_path / "out"), *options])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert options[0] in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
