"""GenEval: the layout for its scorer, its summary, and missing results."""

import json
import os
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.evaluate.conftest import colour
from vargpt_rl.evaluate.geneval import SAMPLES, TASKS, summary

PROMPTS = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "a photo of two cows"},
    {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}], "prompt": "a photo of a red car"},
]


def scorer(images, outfile, right=lambda number, sample: True) -> None:
    """Walks the folders as the benchmark's scorer does, and writes a line for each image as it does."""
    rows = []
    for name in os.listdir(images):
        if not (images / name).is_dir() or not name.isdigit():
            continue
        with (images / name / "metadata.jsonl").open() as file:
            metadata = json.load(file)
        for sample in os.listdir(images / name / "samples"):
            path = images / name / "samples" / sample
            if path.is_file() and re.match(r"\d+\.png", sample):
                Image.open(path).load()
                row = {key: metadata[key] for key in ("tag", "prompt")} | {"metadata": json.dumps(metadata)}
                correct = right(int(name), int(sample.split(".")[0]))
                rows.append(row | {"filename": str(path), "correct": correct, "reason": "", "details": "{}"})
    pd.DataFrame(rows).to_json(outfile, orient="records", lines=True)


def official(path) -> dict[str, float]:
    """The summary of the benchmark, with the same pandas calls."""
    frame = pd.read_json(path, orient="records", lines=True)
    tasks = {tag: own["correct"].mean() for tag, own in frame.groupby("tag", sort=False)}
    return tasks | {
        "overall": np.mean(list(tasks.values())),
        "correct_images": frame["correct"].mean(),
        "correct_prompts": frame.groupby("metadata")["correct"].any().mean(),
    }


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return f"prompts={file}"


def test_writes_the_scorers_layout_and_reads_its_results(command, prompts, painted, folder, result, capsys, tmp_path):
    assert command("benchmark=geneval", prompts) == 2
    said = capsys.readouterr().err
    where = folder("geneval")
    assert f"evaluate_images.py {where / 'images'} --outfile {where / 'results.jsonl'}" in said
    assert said.count("error: ") == 1 and said.splitlines()[-1].endswith("then this command again")
    assert sorted(path.name for path in (where / "images").iterdir()) == ["00000", "00001", "00002"]
    for number, row in enumerate(PROMPTS):
        assert json.loads((where / f"images/{number:05d}/metadata.jsonl").read_text()) == row
        samples = sorted((where / f"images/{number:05d}/samples").iterdir())
        assert [path.name for path in samples] == ["0000.png", "0001.png", "0002.png", "0003.png"]
        seeds = [line["seed"] for line in painted if line["prompt"] == row["prompt"]]
        assert [Image.open(path).getpixel((0, 0)) for path in samples] == [colour(seed) for seed in seeds]
    assert len({line["seed"] for line in painted}) == len(painted) == SAMPLES * len(PROMPTS)

    scorer(where / "images", where / "results.jsonl", lambda number, sample: sample < number)
    assert command("benchmark=geneval", prompts) == 0
    assert len(painted) == SAMPLES * len(PROMPTS), "nothing is drawn again"
    assert result("geneval")["metrics"] == {"single_object": 0.0, "counting": 0.25, "colors": 0.5, "overall": 0.25}
    counts = {"images": 12, "prompts": 3, "unscored": 0, "bad_prompts": 0}
    assert counts.items() <= result("geneval")["counts"].items()
    table = (tmp_path / "out/geneval.md").read_text()
    assert "| single object | counting | colors | overall |" in table, "tasks that were not measured are left out"
    assert "| VARGPT-v1.1 (reported) | 0.96 | 0.48 | 0.83 | 0.53 |" in table


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.sampled_from(TASKS), st.integers(0, 3), st.lists(st.booleans(), min_size=1, max_size=4)),
        min_size=1,
        max_size=8,
    )
)
def test_summary_agrees_with_the_benchmarks(tmp_path_factory, groups):
    rows = [
        {"filename": "f", "tag": tag, "metadata": json.dumps([tag, number]), "correct": correct}
        for tag, number, values in groups
        for correct in values
    ]
    path = tmp_path_factory.mktemp("results") / "results.jsonl"
    pd.DataFrame(rows).to_json(path, orient="records", lines=True)
    ours = summary(rows)
    found = {**ours.metrics, **{key: ours.details[key] for key in ("correct_images", "correct_prompts")}}
    assert found == pytest.approx(official(path), abs=1e-12)


def test_images_of_one_prompt_are_not_independent_of_one_another():
    def width(prompts: int) -> float:
        rows = [
            {"filename": "f", "tag": "colors", "metadata": str(i % prompts), "correct": i % prompts % 2 == 0}
            for i in range(40)
        ]
        low, high = summary(rows).intervals["colors"]
        return high - low

    assert width(10) > 1.5 * width(40)


def test_rejects_incomplete_results(command, prompts, painted, folder, result, capsys):
    command("benchmark=geneval", prompts)
    where = folder("geneval")
    scorer(where / "images", where / "results.jsonl")
    lines = (where / "results.jsonl").read_text().splitlines()
    foreign = json.dumps(json.loads(lines[0]) | {"filename": "elsewhere/00007/samples/0000.png"})
    (where / "results.jsonl").write_text("\n".join([*lines[1:], lines[1], foreign, "not JSON"]))
    capsys.readouterr()
    assert command("benchmark=geneval", prompts) == 2
    assert "11 of 12 images have usable results: run GenEval's scorer" in capsys.readouterr().err
    assert command("benchmark=geneval", prompts, "max_bad_fraction=0.1") == 0
    assert result("geneval")["counts"]["unscored"] == 1
    reasons = [json.loads(line)["reason"] for line in (where.parent / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(reasons) == [
        "not JSON: Expecting value",
        *["result of an unknown image, or a second result of one"] * 2,
    ]


def test_uses_rewritten_prompts_and_keeps_metadata(command, prompts, painted, folder, tmp_path, capsys):
    table = tmp_path / "rewrites.json"
    table.write_text(json.dumps({row["prompt"]: f"{row['prompt']}, sharp" for row in PROMPTS}))
    assert command("benchmark=geneval", prompts, f"rewrites={table}") == 2
    assert {line["prompt"] for line in painted} == {f"{row['prompt']}, sharp" for row in PROMPTS}
    metadata = folder("geneval") / "images/00001/metadata.jsonl"
    assert json.loads(metadata.read_text())["prompt"] == "a photo of two cows"
    for content, said in (
        ("{}", "3 prompts are missing, for example"),
        ("[]", "expected a JSON object"),
        ("{", "expected a JSON"),
    ):
        table.write_text(content)
        capsys.readouterr()
        assert command("benchmark=geneval", prompts, f"rewrites={table}") == 2
        assert f"error: rewrites={table}: {said}" in capsys.readouterr().err


def test_bad_lines_do_not_renumber_the_others(command, painted, folder, tmp_path, capsys, result):
    file = tmp_path / "metadata.jsonl"
    rows = [json.dumps(PROMPTS[0]), '{"prompt": "a cow"}', json.dumps(PROMPTS[2]), '{"prompt": " ", "tag": "colors"}']
    file.write_text("\n".join(rows))
    assert command("benchmark=geneval", f"prompts={file}") == 2
    assert "2 of 4 records are bad" in capsys.readouterr().err
    assert not painted
    assert command("benchmark=geneval", f"prompts={file}", "max_bad_fraction=0.5") == 2
    where = folder("geneval")
    assert sorted(path.name for path in (where / "images").iterdir()) == ["00000", "00002"]
    scorer(where / "images", where / "results.jsonl")
    assert command("benchmark=geneval", f"prompts={file}", "max_bad_fraction=0.5") == 0
    assert result("geneval")["counts"]["bad_prompts"] == 2
