"""The experiment of VARGPT v1: the numbers of the paper's Table 2, and its data from a folder such as ImageNet."""

import json

import pytest
from PIL import Image

from configs.load import load_config
from vargpt_rl.data.instruct.__main__ import main
from vargpt_rl.data.records.reader import ReadOptions
from vargpt_rl.data.records.schema import DRAWN, placeholders
from vargpt_rl.data.records.sources import RecordSource, open_records

# Samples, epochs, batch, learning rate, ZeRO stage (Table 2; samples: sections 3.2 and 4.2).
TABLE = {
    "pretrain": (1_280_000, 1, 1024, 1e-3, 3),
    "understanding": (1_180_000, 1, 256, 5e-5, 2),
    "sft": (1_400_000, 12, 1024, 5e-5, 3),
}


@pytest.fixture(scope="module")
def settings():
    return load_config(["experiment=vargpt_v1"]).at_resolution(256)


@pytest.mark.parametrize("stage", TABLE)
def test_the_recipes_are_those_of_the_table(settings, stage):
    samples, epochs, batch, lr, zero = TABLE[stage]
    recipe = getattr(settings, stage).recipe
    assert (recipe.batch, recipe.lr, recipe.zero) == (batch, lr, zero)
    assert recipe.steps == round(samples * epochs / batch)
    assert (recipe.schedule, recipe.warmup_ratio, recipe.weight_decay) == ("cosine", 0.1, 0.0)
    assert recipe.gradient_checkpointing


def test_sampling_is_that_of_section_5(settings):
    sampling = settings.sampling
    assert (sampling.cfg, sampling.top_k, sampling.top_p, sampling.tau) == (1.5, 900, 0.95, 1.0)
    assert settings.resolutions == [256] and settings.stages == ["pretrain", "understanding", "align"]


def test_a_folder_such_as_imagenet_gives_the_three_sets(tmp_path):
    synsets = {"n01440764": "tench, Tinca tinca", "n02123045": "tabby, tabby cat"}
    captions = []
    for synset in synsets:
        (tmp_path / "train" / synset).mkdir(parents=True)
        for i in range(10):
            name = f"{synset}/{synset}_{i}.JPEG"
            Image.new("RGB", (8, 6), (i, 0, 0)).save(tmp_path / "train" / name)
            captions.append({"id": name, "caption": f"a fish number {i} of {synset}", "file": name})
    (tmp_path / "LOC_synset_mapping.txt").write_text("".join(f"{id} {name}\n" for id, name in synsets.items()))
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))

    def records(name: str, **source) -> list:
        return list(open_records(name, RecordSource(**source), ReadOptions(), tmp_path / "bad"))

    classes = records(
        "classes",
        files=[str(tmp_path / "train")],
        format="synsets",
        layout="imagenet",
        names=str(tmp_path / "LOC_synset_mapping.txt"),
    )
    assert len(classes) == 20
    assert {record.messages[0].text for record in classes} == {
        f"Please generate a picture about {name}" for name in synsets.values()
    }

    written = {}
    for count in (5, 12):
        out = tmp_path / f"{count}.jsonl"
        arguments = [f"captions={tmp_path / 'captions.jsonl'}", f"out={out}", "method=template", f"sample={count}"]
        assert main(arguments) == 0
        instruct = records(f"instruct-{count}", files=[str(out)], format="jsonl", images=str(tmp_path / "train"))
        assert len(instruct) == count
        for record in [*classes, *instruct]:
            assert [mark for message in record.messages for mark in placeholders(message.text)] == [DRAWN]
            assert Image.open(record.images[0].open()).size == (8, 6)
        written[count] = {record.id for record in instruct}
    assert written[5] < written[12], "a larger sample includes a smaller one"
    assert not any({synset in id for id in written[12]} == {True} for synset in synsets), "of both classes"
    first = [row["id"] for row in captions[:5]]
    assert written[5] != set(first), "not the first ones"
    assert main([*arguments[:1], f"out={tmp_path / 'none.jsonl'}", "method=template", "sample=0"]) == 2
