"""A run that is killed again and again, at every step and while its files are written, ends as if nothing had been.

Really killed, but without a cluster (see ``tests.helpers.one_process``); with one: ``tests.driver.test_faults``.
"""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.driver.test_faults import SMALL, STEPS, flip, same
from tests.helpers.forks import run_loop
from tests.helpers.tiny import tiny_checkpoint
from vargpt_rl.storage.checkpoint import check_checkpoint

WRITES = [
    "prompts.jsonl/written",
    "iter-00-sft/checkpoint/marked",
    "iter-00-sft/step-000002/unmarked",
    "iter-00-sft/final/written",
    "iter-00.parquet/written",
    "iter-00-dpo/rank-0/step-2",
    "iter-00-dpo/rank-0/save",
    "iter-00-dpo/checkpoint/there",
    "iter-00-dpo/final/removed",
    "summary.json/written",
]
TOKENIZER = (
    "stages=[tokenizer]",
    "resolutions=[64]",
    "tokenizer.steps=5",
    "tokenizer.images=4",
    "tokenizer.batch=2",
    "learner.save_every=2",
)


def go(folder, name: str, *points: str, settings: tuple[str, ...] = ()) -> list[list]:
    """Each start's point (``end`` for a start that runs to the end), exit code, whether it was missed, and seconds."""
    arguments = [f"runs={folder}", f"checkpoint={folder}/model", f"name={name}", *SMALL.split(), *settings]
    log = folder / f"{name}.log"
    ends = run_loop(arguments, *points, faults=folder / f"{name}-faults", log=log)
    codes = [0 if point == "end" else -signal.SIGKILL for point in points]
    expected = [[*each, False] for each in zip(points, codes, strict=True)]
    assert [end[:3] for end in ends] == expected, log.read_text()[-3000:]
    return ends


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    tiny_checkpoint(folder / "model")
    go(folder, "undisturbed", "end")
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize("points", [STEPS, pytest.param(WRITES, marks=pytest.mark.faults)], ids=["steps", "writes"])
def test_a_run_that_is_killed_everywhere_ends_as_one_that_was_not(folder, points):
    name = f"killed-{len(points)}-{points[0].split('/')[0]}"
    go(folder, name, *points, "end")
    events = same(folder / name, folder / "undisturbed")
    assert events and all(event.startswith("resuming after ") for event in events)


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_damaged_files_are_refused_and_what_was_before_them_is_used(folder):
    run = folder / "damaged"
    go(folder, "damaged", "iter-00/pair")
    weights = run / "checkpoints/iter-00-sft/final/weights.safetensors"
    flip(weights)
    go(folder, "damaged", "iter-00/dpo")
    trainer = run / "checkpoints/iter-00-dpo/trainer"
    assert sorted(path.name for path in trainer.iterdir()) == ["checkpoint-000001", "checkpoint-000002"]
    flip(max((trainer / "checkpoint-000002").glob("state-*.safetensors")))
    go(folder, "damaged", "end")
    again, first, _, refused = same(run, folder / "undisturbed")
    assert again.startswith(f"redoing iter-00/sft: checkpoint {weights.parent}: weights.safetensors is not what")
    assert first == "resuming after iter-00/before"
    assert refused.startswith(f"training checkpoint {trainer}/checkpoint-000002: ")
    assert refused.endswith("is not what was written (size or blake2b differs); resuming from checkpoint-000001")


def test_killed_image_tokenizer_training_resumes_with_the_same_weights(folder):
    go(folder, "tokenizer", "end", settings=TOKENIZER)
    points = ["tokenizer/rank-0/step-3", "trainer/checkpoint-000004/written", "tokenizer/final/written"]
    go(folder, "tokenizer-killed", *points, "end", settings=TOKENIZER)
    runs = folder / "tokenizer", folder / "tokenizer-killed"
    expected, found = (load_file(check_checkpoint(run / "checkpoints/tokenizer/final")) for run in runs)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    whole, killed = (json.loads((run / "summary.json").read_text())["stages"]["tokenizer"] for run in runs)
    assert {**killed, "seconds": 0, "swap": 0} == {**whole, "seconds": 0, "swap": 0}
    assert not (runs[1] / "checkpoints/tokenizer/trainer").exists()
