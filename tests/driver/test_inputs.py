"""Inputs of a run on records are read and checked before any worker starts."""

import json
from dataclasses import asdict

import pytest
from PIL import Image

from configs.load import load_config
from tests.helpers.streams import write_sources
from vargpt_rl.data.records.stream import EDITS
from vargpt_rl.driver.inputs import gather, is_judged_by_its_reward
from vargpt_rl.model.families import load_config as load_config_of
from vargpt_rl.model.families import markup_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "winners").mkdir()
    rows = [{"id": f"p{number}", "prompt": f"Image {number}"} for number in range(4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows[:3]:
        Image.new("RGB", (40, 40)).save(folder / "winners" / f"{row['id']}.png")
    return folder


@pytest.fixture(scope="module")
def sources(folder):
    return write_sources(folder / "data")


@pytest.fixture
def settings(folder, sources, checkpoint, tmp_path):
    """Makes the settings of a run, with some of the sources."""

    def make(*overrides: str, names=("lines", "tars", "questions")):
        given = []
        for name in names:
            keys = [f"{key}:{json.dumps(value)}" for key, value in asdict(sources[name]).items() if value is not None]
            given.append(f"+data.sources.{name}={{{','.join(keys)}}}")
        paths = [f"checkpoint={checkpoint}", f"runs={tmp_path}", f"preference.prompts={folder}/prompts.jsonl"]
        small = ["resolutions=[32,64]", "data.held_out_fraction=0.3", "data.max_tokens=400", "data.block=24"]
        return load_config(["data=records", *paths, *small, f"preference.winners={folder}/winners", *given, *overrides])

    return make


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["adapter.targets=[language_model,blocks.9.qkv]"], r"blocks\.9\.qkv fits no linear layer, expected parts"),
        (["adapter.targets=[projectors]", "adapter.full=[image_decoder]", "sft.frozen=[image_decoder]"], None),
        (["adapter.targets=[image_decoder]"], "nothing of stage pretrain, expected some of"),
        (["adapter.targets=[image_decoder,projectors]"], "nothing of stage understanding"),
    ],
)
def test_an_adapter_must_fit_the_model_and_the_stages(checkpoint, tmp_path, changes, told):
    stages = [] if told is not None else ["stages=[pretrain,align]"]
    config = load_config(["adapter=lora", f"checkpoint={checkpoint}", f"runs={tmp_path}", *stages, *changes])
    if told is None:
        gather(config)
        return
    with pytest.raises(ValueError, match=told) as error:
        gather(config)
    assert "\n" not in str(error.value)


def test_a_run_of_records_has_a_stream_and_prompts(settings):
    found = gather(settings())
    assert found.stream.tasks == {"lines": "generation", "tars": "generation", "questions": "understanding"}
    assert found.stream.packs and found.stream.quarantine.is_absolute()
    assert found.prompts is None
    assert sorted(prompt.id for prompt in found.source.prompts("train", 10, 0)) == ["p0", "p1", "p2", "p3"]
    held = found.source.prompts("held_out", 100, 0)
    assert 5 < len(held) < 30 and all(found.source.winner_key(prompt) for prompt in held)
    assert found.quarantine.counts == {"prompt without a winner": 1}
    few = gather(settings("evaluation.prompts=3", "evaluation.grid=2"))
    assert len(few.source.prompts("held_out", 100, 0)) == 3


def test_a_run_without_iterations_needs_no_prompts(settings):
    found = gather(settings("stages=[understanding]", "preference.prompts=null", "data.held_out_fraction=0"))
    assert found.source.prompts("held_out", 9, 0) == [] and found.stream is not None


def test_edits_are_streamed_too(settings, folder, sources, tmp_path):
    rows = [
        {"instruction": "Make it blue.", "input_images": [f"{n}.png"], "output_image": f"{n + 1}.png"} for n in range(9)
    ]
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"files:[{tmp_path}/edits.jsonl],layout:editing,images:{sources['lines'].images}"
    given = [f"+data.sources.edits={{{source}}}", "data.seen_pixels=3136"]
    found = gather(settings("stages=[understanding,edit]", *given, "edit.recipe.micro_batch=4"))
    assert found.stream.tasks["edits"] == "editing"
    stream, chat = found.stream.at(64, wanted=EDITS), markup_for(found.model, load_config_of(found.model))
    batch = next(iter(stream.mixture(chat, micro_batch=4, seed=0, rank=0, ranks=1)))
    assert len(batch["crops"]) == 4 and len(batch["image_grid_thw"]) == 4
    with pytest.raises(ValueError, match="for edit at 64 px: 4 generation samples in each batch: no source"):
        gather(settings("stages=[understanding,edit]"))


@pytest.mark.parametrize(
    ("names", "overrides", "named"),
    [
        (("lines", "questions"), ["stages=[pretrain]"], "no stage of stages=['pretrain'] learns from questions"),
        (("lines",), [], "for understanding at 32 px: 12 understanding samples in each batch: no source"),
        (("questions",), ["stages=[understanding]"], "understanding at 32 px: 4 generation samples"),
        (("lines", "questions"), ["understanding.drawing_share=0.01"], "drawings gives 0 of each batch=16"),
        (("lines", "questions"), ["data.held_out_fraction=0"], "no record of data.sources is held out"),
        (("lines", "questions"), ["+data.sources.x.files=[nothing.jsonl]"], "source x: files: nothing fits"),
    ],
)
def test_what_a_stage_lacks_is_named(settings, names, overrides, named):
    with pytest.raises(ValueError) as error:
        gather(settings(*overrides, names=names))
    assert named in str(error.value)


def test_a_cache_is_checked_for_each_resolution(settings, tmp_path, monkeypatch):
    opened = []

    class CacheDouble:
        crops = 1

        def __init__(self, folder, tokenizer_checksum, resolution):
            if resolution == 64:
                raise ValueError(f"{folder}: features of another image tokenizer")
            opened.append((folder, tokenizer_checksum, resolution))

    monkeypatch.setattr("vargpt_rl.data.records.stream.FeatureCache", CacheDouble)
    with pytest.raises(ValueError, match="for sft at 64 px: .*64: features of another image tokenizer"):
        gather(settings(f"data.encoded={tmp_path}"))
    assert {(folder.name, resolution) for folder, _, resolution in opened} == {("32", 32)}


GATED = ["preference.builder=rewards.preferences:reward_gated", "reward.path=rewards.shapes:shapes_reward"]
SHARP = "reward.path=rewards.technical:sharpness"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], False),
        (GATED[1:], False),
        (GATED, True),
        ([GATED[0], SHARP], False),
        ([*GATED, f"evaluation.{SHARP}"], False),
    ],
)
def test_scoring_by_the_training_reward_is_known(overrides, told, tmp_path):
    config = load_config([f"runs={tmp_path}", "align.methods=[dpo]", "reward.path=null", *overrides])
    found = gather(config)
    assert (found.judge is not None) == any("evaluation" in override for override in overrides)
    assert is_judged_by_its_reward(config) == told


def test_a_judge_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ValueError, match="'nowhere.py:judge': there is no file"):
        gather(load_config([f"runs={tmp_path}", "evaluation.reward.path=nowhere.py:judge"]))
